import math

import pytest
import torch

from hooklens.pool.comparing import weights
from hooklens.pool.comparing.weights import compare_weights, sum_by_layer
from tests.model.networks import make_model
from tests.quantised_models import plain, quantise


def flat(*tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


@pytest.mark.parametrize("chunk", [7, 2**22])
@pytest.mark.parametrize("network", ["grouped", "learned, tied", "latent attention"])
def test_sums_are_those_of_flattened_weights(network, chunk, monkeypatch):
    monkeypatch.setattr(weights, "_CHUNK_ENTRIES", chunk)
    first, second = make_model(network), make_model(network, seed=1)
    ours, theirs = first.named_weights(), second.named_weights()
    sums = compare_weights(first, second)
    for name, found in sums.items():
        a, b = flat(ours[name]), flat(theirs[name])
        assert found.relative_norm == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
        assert found.cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-12, abs=1e-14)
    assert set(ours) - set(sums) == ({"unembed.W_U"} if first.cfg.tied_unembed else set())

    layers = sum_by_layer(sums)
    assert list(layers) == [None, *range(first.cfg.n_layers)]
    names = [name for name in sums if name.startswith("blocks.1.")]
    a, b = flat(*(ours[name] for name in names)), flat(*(theirs[name] for name in names))
    assert layers[1].relative_norm == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-12)
    assert layers[1].cosine == pytest.approx(float(a @ b / (a.norm() * b.norm())), rel=1e-12, abs=1e-14)


def test_a_model_is_no_way_from_itself():
    model = make_model("grouped")
    for found in compare_weights(model, model).values():
        assert found.relative_norm == 0
        assert found.cosine == pytest.approx(1, abs=1e-12)


def test_weights_that_are_0():
    first, second = make_model("rotary"), make_model("rotary")
    with torch.no_grad():
        first.blocks[0].attn.b_O.zero_()
        first.blocks[1].attn.b_O.zero_()
        second.blocks[1].attn.b_O.zero_()
    sums = compare_weights(first, second)
    assert sums["blocks.0.attn.b_O"].relative_norm == math.inf
    assert math.isnan(sums["blocks.0.attn.b_O"].cosine)
    assert sums["blocks.1.attn.b_O"].relative_norm == 0


def test_what_only_one_model_has_is_listed_without_a_number():
    """Left out, the table would say that all weights of two models had been compared."""
    first, second = make_model("grouped"), make_model("rotary")
    sums = compare_weights(first, second)
    assert set(sums) == {*first.named_weights(), *second.named_weights()}
    assert first.W_K.shape != second.W_K.shape
    assert math.isnan(sums["blocks.0.attn.W_K"].relative_norm)
    assert math.isnan(sums["blocks.0.attn.W_K"].cosine)
    assert math.isnan(sum_by_layer(sums)[0].relative_norm)
    assert not math.isnan(sums["embed.W_E"].cosine)


def test_quantised_weights_count_as_what_they_stand_for():
    model = plain("grouped", dtype=torch.float32)
    quantised = quantise(model, "int8")
    against_dense = compare_weights(quantised, quantised.dequantize())
    assert {found.relative_norm for found in against_dense.values()} == {0.0}
    moved = compare_weights(model, quantised)["blocks.0.mlp.W_in"].relative_norm
    # 8 bits for each row: a few thousandths.
    assert 0 < moved < 0.02
