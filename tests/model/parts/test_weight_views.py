"""Tests of hooklens.model.parts.weight_views."""

import pytest
import torch

from hooklens.errors import ConfigError
from tests.model.networks import CONFIGS, make_config, make_model, random_tokens


@pytest.mark.parametrize("network", CONFIGS)
def test_stacked_weights(network):
    model = make_model(network)
    cfg, blocks = model.cfg, model.block_list()
    heads = (cfg.n_layers, cfg.n_heads, cfg.d_model, cfg.d_head)
    kv_heads = (cfg.n_layers, cfg.n_kv_heads, cfg.d_model, cfg.d_head)
    assert (model.W_Q.shape, model.W_K.shape, model.W_V.shape) == (heads, kv_heads, kv_heads)
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
        for layer, block in enumerate(blocks):
            weight = getattr(block.attn, name)
            stacked = getattr(model, name)[layer]
            assert torch.equal(stacked, torch.zeros_like(stacked) if weight is None else weight)
    for name in ("W_in", "W_out", "b_in", "b_out"):
        for layer, block in enumerate(blocks):
            weight = getattr(block.mlp, name)
            stacked = getattr(model, name)[layer]
            assert torch.equal(stacked, torch.zeros_like(stacked) if weight is None else weight)
    assert model.b_U.shape == (cfg.d_vocab,)
    assert model.W_U.shape == (cfg.d_model, cfg.d_vocab)
    assert model.b_gate.shape == (cfg.n_layers, cfg.d_mlp)


@pytest.mark.parametrize("network", ["rotary", "grouped", "shared norm"])
def test_circuits_repeat_shared_keys(network):
    model = make_model(network)
    group = model.cfg.n_heads // model.cfg.n_kv_heads
    for layer in range(2):
        for head in range(4):
            w_k, w_v = model.W_K[layer, head // group], model.W_V[layer, head // group]
            torch.testing.assert_close(model.QK.AB[layer, head], model.W_Q[layer, head] @ w_k.T)
            torch.testing.assert_close(model.OV.AB[layer, head], w_v @ model.W_O[layer, head])


def test_nothing_is_kept():
    model = make_model("rotary")
    with torch.no_grad():
        model.blocks[1].attn.W_Q.zero_()
    assert model.W_Q[1].count_nonzero() == 0


def test_accumulated_bias_against_a_run_on_a_silent_stream():
    model = make_model("bare")
    b_O, b_out = model.b_O, model.b_out
    torch.testing.assert_close(model.accumulated_bias(0), torch.zeros(12, dtype=torch.float64))
    torch.testing.assert_close(model.accumulated_bias(1, mlp_input=True), b_O[0] + b_O[1] + b_out[0])
    torch.testing.assert_close(model.accumulated_bias(2), (b_O + b_out).sum(0))
    torch.testing.assert_close(model.accumulated_bias(2, include_mlp_biases=False), b_O.sum(0))
    for layer, mlp_input in ((3, False), (2, True), (-1, False)):
        with pytest.raises(ConfigError, match=rf"accumulated_bias: layer {layer} is out of range for 2 layers"):
            model.accumulated_bias(layer, mlp_input=mlp_input)


@pytest.mark.parametrize("network", [name for name, cfg in CONFIGS.items() if not cfg.norm_after])
@pytest.mark.parametrize(("layer", "mlp_input"), [(0, True), (1, False), (1, True), (2, False)])
def test_accumulated_bias_is_the_bias_of_the_full_decomposition(network, layer, mlp_input):
    """A parallel block's MLP was said to read the bias of the attention beside it."""
    model = make_model(network)
    _, cache = model.run_with_cache(random_tokens(2, 3))
    stack, labels = cache.get_full_resid_decomposition(layer, mlp_input=mlp_input, return_labels=True)
    assert labels[-1] == "bias"
    expected = model.accumulated_bias(layer, mlp_input=mlp_input).detach()
    torch.testing.assert_close(stack[-1], expected.expand(2, 3, 12))


def test_biases_behind_norms_have_no_constant_sum():
    with pytest.raises(ConfigError, match=r"norms follow the branches .* differs from position to position"):
        make_model("capped").accumulated_bias(1)


def test_a_model_without_blocks():
    model = make_model(make_config(n_layers=0, n_kv_heads=2))
    assert (model.W_K.shape, model.W_out.shape, model.b_in.shape) == ((0, 2, 12, 6), (0, 20, 12), (0, 20))
    assert model.OV.shape == model.QK.shape == (0, 4, 12, 12)
    assert model.all_composition_scores("K").shape == (0, 4, 0, 4)
    assert model.accumulated_bias(0).tolist() == [0] * 12


def test_what_a_model_does_not_have():
    model = make_model("rotary")
    with pytest.raises(ConfigError, match=r"W_gate: layers \[0, 1\] have none: its MLPs are not gated"):
        _ = model.W_gate
    with pytest.raises(ConfigError, match=r"W_pos: positions are RotaryPositions\(.*only learned positions"):
        _ = model.W_pos


def test_counting_and_labels():
    tied, loose = (make_model(make_config(tied_unembed=tied)) for tied in (True, False))
    assert loose.n_params_total - tied.n_params_total == 12 * 23
    assert tied.all_head_labels() == [f"L{layer}H{head}" for layer in range(2) for head in range(4)]


def test_composition_scores_are_zero_where_heads_do_not_follow():
    scores = make_model("grouped").all_composition_scores("V")
    assert scores.shape == (2, 4, 2, 4)
    assert scores[0, :, 1].min() > 0
    assert scores[1].count_nonzero() == 0
    assert scores[0, :, 0].count_nonzero() == 0
