"""Composition scores against the dense formula, head by head, in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.config import RotaryPositions
from hooklens.errors import InputError
from hooklens.weights.composition import all_composition_scores, composition_scores
from hooklens.weights.factored import FactoredMatrix
from tests.model.networks import make_config, make_model

# Rounding of matrix products of a dozen terms in float64, relative to scores between 0 and 1.
CLOSE = {"rtol": 0, "atol": 1e-12}


def random_factored(*shape, inner=3):
    *leading, left, right = shape
    A = torch.randn(*leading, left, inner, dtype=torch.float64)
    return FactoredMatrix(A, torch.randn(*leading, inner, right, dtype=torch.float64))


def dense_score(left, right):
    return (left @ right).norm() / (left.norm() * right.norm())


def test_scores_of_pairs_are_the_dense_formula():
    left, right = random_factored(4, 8, 7), random_factored(4, 7, 9, inner=2)
    expected = torch.stack([dense_score(left.AB[i], right.AB[i]) for i in range(4)])
    torch.testing.assert_close(composition_scores(left, right), expected, **CLOSE)


def test_leading_axes_broadcast():
    left, right = random_factored(4, 8, 7), random_factored(5, 7, 9)
    expected = torch.tensor([[dense_score(a, b) for b in right.AB] for a in left.AB], dtype=torch.float64)
    torch.testing.assert_close(composition_scores(left.unsqueeze(1), right), expected, **CLOSE)


def test_a_projection_composes_with_itself_as_one_over_root_rank():
    """For a projection P of rank r: ||P P|| / ||P||^2 = 1 / sqrt(r)."""
    basis = torch.linalg.qr(torch.randn(10, 4, dtype=torch.float64)).Q
    projection = FactoredMatrix(basis, basis.T)
    assert composition_scores(projection, projection).item() == pytest.approx(0.5, abs=1e-12)


def test_a_zero_matrix_composes_with_nothing():
    zero = FactoredMatrix(torch.zeros(5, 2), torch.zeros(2, 5))
    other = FactoredMatrix(torch.randn(5, 2), torch.randn(2, 5))
    assert composition_scores(zero, other) == 0
    assert composition_scores(other, zero) == 0


def random_weights(n_layers, n_heads, n_kv_heads, d_model, d_head, dtype=torch.float64):
    heads = {"W_Q": n_heads, "W_K": n_kv_heads, "W_V": n_kv_heads}
    weights = {name: torch.randn(n_layers, n, d_model, d_head, dtype=dtype) for name, n in heads.items()}
    return weights | {"W_O": torch.randn(n_layers, n_heads, d_head, d_model, dtype=dtype)}


@given(
    mode=st.sampled_from(["Q", "K", "V"]),
    n_layers=st.integers(1, 4),
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    d_model=st.integers(1, 9),
    d_head=st.integers(1, 4),
)
def test_all_scores_are_the_dense_formula_for_later_layers_and_zero_elsewhere(
    mode, n_layers, n_kv_heads, group, d_model, d_head
):
    n_heads = n_kv_heads * group
    weights = random_weights(n_layers, n_heads, n_kv_heads, d_model, d_head)

    def circuits(layer, head):
        W_Q, W_O = weights["W_Q"][layer, head], weights["W_O"][layer, head]
        W_K, W_V = weights["W_K"][layer, head // group], weights["W_V"][layer, head // group]
        OV, QK = W_V @ W_O, W_Q @ W_K.T
        return OV, {"Q": QK, "K": QK.T, "V": OV}[mode]

    scores = all_composition_scores(**weights, mode=mode)
    assert scores.shape == (n_layers, n_heads, n_layers, n_heads)
    expected = torch.zeros_like(scores)
    for earlier in range(n_layers):
        for later in range(earlier + 1, n_layers):
            for i in range(n_heads):
                for j in range(n_heads):
                    OV, reader = circuits(earlier, i)[0], circuits(later, j)[1]
                    expected[earlier, i, later, j] = dense_score(OV, reader)
    torch.testing.assert_close(scores, expected, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_have_the_dtype_of_the_weights(dtype):
    weights = random_weights(2, 2, 1, 8, 3, dtype=dtype)
    exact = all_composition_scores(**{name: weight.double() for name, weight in weights.items()}, mode="K")
    scores = all_composition_scores(**weights, mode="K")
    assert scores.dtype == dtype
    # Half a unit in the last place of bfloat16 for scores below 1; float32 is far inside.
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=2**-9)


def test_errors_say_what_was_found():
    weights = random_weights(2, 4, 3, 8, 3)
    with pytest.raises(InputError, match=r"W_K has 3 heads, W_V has 3 heads; expected a divisor of the 4 heads"):
        all_composition_scores(**weights, mode="Q")
    with pytest.raises(InputError, match="mode is 'O'; expected 'Q', 'K' or 'V'"):
        all_composition_scores(**random_weights(2, 4, 2, 8, 3), mode="O")
    with pytest.raises(InputError, match=r"shapes \(8, 7\) and \(8, 7\).*as many as the right one's rows"):
        composition_scores(random_factored(8, 7), random_factored(8, 7))
    with pytest.raises(InputError, match=r"leading axes \(2,\) and \(3,\) do not broadcast.*unsqueeze"):
        composition_scores(random_factored(2, 7, 7), random_factored(3, 7, 7))


def test_scores_of_rotary_heads_hold_at_distance_0():
    """Nothing said so: at another distance the rotation stands between `W_Q` and `W_K`, and the score differs."""
    model = make_model(make_config(positions=RotaryPositions(dim=6)))
    scores = model.all_composition_scores("K").detach()
    W = {name: getattr(model, name).detach() for name in ("W_Q", "W_K", "W_V", "W_O")}

    OV = W["W_V"][0, 2] @ W["W_O"][0, 2]
    for distance in (0, 3):
        angles = distance * 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
        rotation = torch.zeros(6, 6, dtype=torch.float64)
        for i, angle in enumerate(angles):
            # Entry i is turned with entry i + 3.
            rotation[i, i] = rotation[i + 3, i + 3] = torch.cos(angle)
            rotation[i, i + 3], rotation[i + 3, i] = torch.sin(angle), -torch.sin(angle)
        QK = W["W_Q"][1, 1] @ rotation @ W["W_K"][1, 1].T
        same = float(dense_score(OV, QK.T)) == pytest.approx(float(scores[0, 2, 1, 1]), abs=1e-12)
        assert same == (distance == 0)


def test_weights_are_read_as_they_are():
    """Nothing said so: a norm's weight counts once it is folded into what reads behind it."""
    model = make_model("grouped")
    folded = model.process_weights(fold_ln=True)
    with torch.no_grad():
        for block in model.blocks:
            for name in ("W_Q", "W_K", "W_V"):
                weight = getattr(block.attn, name)
                weight.mul_(block.ln1.w[None, :, None])
    for mode in ("Q", "K", "V"):
        expected = model.all_composition_scores(mode)
        torch.testing.assert_close(folded.all_composition_scores(mode), expected, **CLOSE)
