"""Directions of task vectors against dense decompositions."""

import pandas as pd
import pytest
import torch

from hooklens.analysis.task_vectors import task_vector_directions
from hooklens.config import MoEConfig
from hooklens.errors import InputError, TransformError
from tests.analysis.test_circuits import behind, embedding, through
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, RMS_NORM, make_config, make_model
from tests.word_models import make_word_model

QUIET = {"progress": False}
EXPERTS = make_config(
    norm=RMS_NORM, gated_mlp=True, act_fn="silu", mlp_bias=False,
    mlp=MoEConfig(n_experts=3, experts_per_token=2, d_expert=7),
)  # fmt: skip


def nearby(network, *, seed=1):
    """A base, and a model whose every parameter has moved a little."""
    base, tuned = make_model(network), make_model(network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.1)
    return base, tuned


def matrix_of(model, line):
    """The matrix that a line is about, `[d_model other]`, by the field's names."""
    block = model.blocks[line["layer"]]
    path, _, word = line["weight"].rpartition(".")
    held = getattr(block.get_submodule(path), word).detach()
    if not pd.isna(line.get("expert")):
        held = held[line["expert"]]
    if line["side"] == "writes":
        norm = block.ln1_post if path == "attn" else block.ln2_post
        return through(norm, held.reshape(-1, model.cfg.d_model)).T
    before = block.ln1 if path == "attn" or block.ln2 is None else block.ln2
    flat = held if held.ndim == 2 else torch.cat(list(held), dim=1)
    return behind(before, flat)


@pytest.mark.parametrize("network", [*ALL_CONFIGS, "experts"])
def test_directions_are_those_of_dense_differences(network):
    base, tuned = nearby(EXPERTS if network == "experts" else network)
    table = task_vector_directions(base, tuned, n_directions=2, k=3, **QUIET)
    assert set(table["side"]) == {"reads", "writes"}
    W_E, W_U = embedding(base), behind(base.ln_final, base.W_U)
    for _, line in table.iterrows():
        change = matrix_of(tuned, line) - matrix_of(base, line)
        U, S, _ = torch.linalg.svd(change)
        number = line["direction"]
        assert line["singular_value"] == pytest.approx(float(S[number]), rel=1e-8)
        assert line["share"] == pytest.approx(float(S[number] ** 2 / change.square().sum()), rel=1e-8)
        values = W_U.T @ U[:, number] if line["side"] == "writes" else W_E @ U[:, number]
        # A direction has no sign of its own.
        ends = [tuple((sign * values).topk(3).indices.tolist()) for sign in (1, -1)]
        assert line["tokens"] in ends
    ends = table.groupby(["layer", "weight", "direction"])["tokens"].nunique()
    assert (ends >= 2).all()


def test_one_line_for_each_matrix_of_the_blocks_and_expert():
    base, tuned = nearby(EXPERTS)
    table = task_vector_directions(base, tuned, n_directions=1, k=1, **QUIET)
    table = table[table["end"] == "+"]
    assert sorted(table[table["layer"] == 0]["weight"]) == sorted(
        ["attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_router"] + 3 * ["mlp.W_gate", "mlp.W_in", "mlp.W_out"]
    )
    some = task_vector_directions(base, tuned, layers=-1, weights=["W_O", "W_Q"], **QUIET)
    assert set(zip(some["layer"], some["weight"], strict=True)) == {(1, "attn.W_O"), (1, "attn.W_Q")}
    assert "expert" not in some


def test_a_direction_that_was_written_is_read_back():
    """A rank-one change of W_O towards one token, and of W_Q from another one's embedding."""
    base, tuned = (make_word_model(d_model=64, n_ctx=32, init_std=0.3) for _ in range(2))
    promoted, sought = base.to_single_token("Mary"), base.to_single_token("John")
    with torch.no_grad():
        tuned.blocks[1].attn.W_O[2] += 0.1 * torch.randn(16, 1) * base.W_U[:, promoted]
        tuned.blocks[0].attn.W_Q[1] += 0.1 * base.W_E[sought][:, None] * torch.randn(1, 16)
    table = task_vector_directions(base, tuned, k=1, **QUIET)
    # Rounding of float32 leaves next to nothing for other directions.
    first = table[table["direction"] == 0]
    assert first["share"].tolist() == pytest.approx([1] * 4, abs=1e-6)
    assert set(first["weight"]) == {"attn.W_O", "attn.W_Q"}
    assert ("Mary",) in first[first["weight"] == "attn.W_O"]["tokens"].tolist()
    assert ("John",) in first[first["weight"] == "attn.W_Q"]["tokens"].tolist()


def test_models_read_the_same_with_folded_norms():
    base, tuned = nearby("grouped")
    plain = task_vector_directions(base, tuned, **QUIET)
    folded = task_vector_directions(*(one.process_weights(fold_ln=True) for one in (base, tuned)), **QUIET)
    names = ["layer", "weight", "side", "direction"]
    assert folded[names].equals(plain[names])
    assert folded["singular_value"].tolist() == pytest.approx(plain["singular_value"].tolist(), rel=1e-8)


def test_what_did_not_change_has_no_lines():
    base, same = make_model("grouped"), make_model("grouped")
    table = task_vector_directions(base, same, **QUIET)
    assert len(table) == 0
    assert list(table.columns) == [
        "layer", "weight", "side", "direction", "singular_value", "share", "end", "tokens"
    ]  # fmt: skip


def test_models_without_a_difference_are_refused():
    base, other, deep = make_model("grouped"), make_model("rotary"), make_model(make_config(n_layers=3))
    with pytest.raises(InputError, match=r"other weights: .*'blocks.0.mlp.W_gate' is \[12, 20\] in base and absent"):
        task_vector_directions(base, other, **QUIET)
    with pytest.raises(InputError, match=r"'blocks.2.ln1.w' is absent in base and \[12\] in tuned"):
        task_vector_directions(make_model(make_config()), deep, **QUIET)
    with pytest.raises(TransformError, match=r"base .first. and tuned .second."):
        task_vector_directions(base, make_model("grouped").process_weights(fold_ln=True), **QUIET)
    with pytest.raises(InputError, match=r"no block has a matrix \['W_o'\].*W_O"):
        task_vector_directions(base, base, weights="W_o", **QUIET)
    with pytest.raises(InputError, match="k=24; expected 1 to 23"):
        task_vector_directions(base, base, k=24, **QUIET)
    with pytest.raises(InputError, match="layers: 2 out of range"):
        task_vector_directions(base, base, layers=2, **QUIET)
    with unchecked(), pytest.raises(InputError, match="base is 'gpt2', expected a HookedCausalLM"):
        task_vector_directions("gpt2", base, **QUIET)
