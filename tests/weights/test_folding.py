"""What folding leaves behind; that log-probabilities stay equal is tested in test_processing.py."""

import pytest
import torch

from hooklens.weights.folding import fold_ln, fold_value_biases
from tests.weights.reference_network import CONFIGS, random_state, random_tokens, run_reference


@pytest.mark.parametrize("name", CONFIGS)
def test_folded_norms_are_neutral_and_other_norms_stay(name):
    cfg = CONFIGS[name]
    state = random_state(cfg)
    processed = fold_ln(state, cfg)
    for weight, tensor in processed.state.items():
        module, _, part = weight.rpartition(".")
        norm = module.rpartition(".")[2]
        if norm in {"ln1", "ln2", "ln_final"}:
            neutral = 0.0 if cfg.description.norms[module].unit_offset else 1.0
            assert (tensor == (neutral if part == "w" else 0.0)).all(), weight
        elif norm in {"ln1_post", "ln2_post", "q_norm", "k_norm"}:
            assert tensor is state[weight]


def test_layer_norm_biases_bring_biases_into_being():
    cfg = CONFIGS["sequential, no biases in the maps"]
    state = random_state(cfg)
    processed = fold_ln(state, cfg)
    new = processed.cfg
    assert (new.qkv_bias, new.out_bias, new.mlp_bias, new.unembed_bias) == (True, False, True, True)
    shift = state["blocks.1.ln1.b"]
    expected = torch.einsum("d,ndh->nh", shift, state["blocks.1.attn.W_K"])
    torch.testing.assert_close(processed.state["blocks.1.attn.b_K"], expected)
    assert (processed.state["blocks.1.mlp.b_out"] == 0).all()


@pytest.mark.parametrize("name", ["rms, gated, grouped", "layer norm without bias, unit offset"])
def test_norms_without_bias_bring_none_into_being(name):
    cfg = CONFIGS[name]
    assert fold_ln(random_state(cfg), cfg).cfg == cfg.replace(tied_unembed=False)


def test_only_the_final_norm_folds_where_blocks_have_none_at_their_entrance():
    cfg = CONFIGS["norms after only"]
    state = random_state(cfg)
    processed = fold_ln(state, cfg)
    assert processed.cfg == cfg.replace(unembed_bias=True)
    same = {name for name, tensor in processed.state.items() if state.get(name) is tensor}
    assert set(processed.state) - same == {"ln_final.w", "ln_final.b", "unembed.W_U", "unembed.b_U"}


def test_maps_that_read_a_layer_norm_are_centred_and_those_of_an_rms_norm_are_not():
    cfg = CONFIGS["gated with biases"]
    layer = fold_ln(random_state(cfg), cfg).state
    for name in ("attn.W_Q", "attn.W_K", "attn.W_V", "mlp.W_in", "mlp.W_gate"):
        # A mean over 12 float64 numbers of size 1 that should be 0.
        assert layer[f"blocks.0.{name}"].mean(dim=-2).abs().max() < 1e-15
    assert layer["unembed.W_U"].mean(dim=-2).abs().max() < 1e-15
    cfg = CONFIGS["rms, gated, grouped"]
    state = random_state(cfg)
    scaled = state["blocks.0.ln1.w"][:, None] * state["blocks.0.attn.W_Q"]
    torch.testing.assert_close(fold_ln(state, cfg).state["blocks.0.attn.W_Q"], scaled)


def test_a_shared_norm_is_folded_into_attention_and_mlp():
    """The norm of one-norm parallel blocks feeds both branches; folding it into one only changes the other."""
    cfg = CONFIGS["parallel, shared norm, multi-query, tied"]
    state = random_state(cfg)
    folded, weight = fold_ln(state, cfg).state, state["blocks.1.ln1.w"]
    for name in ("attn.W_Q", "attn.W_V", "mlp.W_in"):
        scaled = weight[:, None] * state[f"blocks.1.{name}"]
        torch.testing.assert_close(folded[f"blocks.1.{name}"], scaled - scaled.mean(dim=-2, keepdim=True))


def test_a_tied_unembedding_is_untied_and_the_embedding_keeps_its_value():
    cfg = CONFIGS["sequential, tied, learned"]
    state = random_state(cfg)
    processed = fold_ln(state, cfg)
    assert processed.state["embed.W_E"] is state["embed.W_E"]
    assert not torch.equal(processed.state["unembed.W_U"], state["embed.W_E"].T)


def test_value_biases_repeat_over_the_group():
    cfg = CONFIGS["parallel, two norms, grouped"]
    state = random_state(cfg)
    processed = fold_value_biases(state, cfg)
    assert processed.cfg == cfg.replace(out_bias=True)
    expected = sum(
        state["blocks.0.attn.b_V"][head // 2] @ state["blocks.0.attn.W_O"][head] for head in range(cfg.n_heads)
    )
    torch.testing.assert_close(processed.state["blocks.0.attn.b_O"], expected)
    assert (processed.state["blocks.0.attn.b_V"] == 0).all()


def test_folding_value_biases_without_biases_changes_nothing():
    cfg = CONFIGS["parallel, shared norm, multi-query, tied"]
    state = random_state(cfg)
    processed = fold_value_biases(state, cfg)
    assert processed.cfg == cfg
    assert all(torch.equal(processed.state[name], state[name]) for name in state)
    assert torch.equal(
        run_reference(processed.state, processed.cfg, random_tokens(cfg)), run_reference(state, cfg, random_tokens(cfg))
    )
