"""What centring leaves behind; that log-probabilities stay equal is tested in test_processing.py."""

import torch

from hooklens.weights.centering import center_unembed, center_writing_weights
from tests.weights.reference_network import CONFIGS, random_state, random_tokens, run_reference


def test_everything_that_writes_to_the_stream_has_mean_zero():
    cfg = CONFIGS["sequential, tied, learned"]
    state = center_writing_weights(random_state(cfg), cfg).state
    writers = [name for name in state if name.rpartition(".")[2] in {"W_E", "W_pos", "W_O", "b_O", "W_out", "b_out"}]
    assert len(writers) == 2 + 4 * cfg.n_layers
    for name in writers:
        # Means of 12 float64 numbers of size 1 that should be 0.
        assert state[name].mean(dim=-1).abs().max() < 1e-15, name


def test_a_tied_unembedding_keeps_its_value_when_the_embedding_is_centred():
    cfg = CONFIGS["sequential, tied, learned"]
    state = random_state(cfg)
    processed = center_writing_weights(state, cfg)
    assert not processed.cfg.tied_unembed
    assert torch.equal(processed.state["unembed.W_U"], state["embed.W_E"].T)
    assert not torch.equal(processed.state["embed.W_E"], state["embed.W_E"])


def test_maps_that_read_the_stream_are_untouched():
    cfg = CONFIGS["gated with biases"]
    state = random_state(cfg)
    processed = center_writing_weights(state, cfg)
    for name in ("attn.W_Q", "attn.b_V", "mlp.W_in", "mlp.b_gate", "ln1.w"):
        assert processed.state[f"blocks.0.{name}"] is state[f"blocks.0.{name}"]


def test_centring_the_unembedding_moves_logits_by_a_constant_per_position():
    cfg = CONFIGS["sequential, alibi"]
    state, tokens = random_state(cfg), random_tokens(cfg)
    processed = center_unembed(state, cfg)
    moved = run_reference(state, cfg, tokens) - run_reference(processed.state, processed.cfg, tokens)
    assert moved.abs().max() > 0.01
    torch.testing.assert_close(moved, moved[..., :1].expand_as(moved), rtol=0, atol=1e-12)
    assert processed.state["unembed.b_U"].mean().abs() < 1e-15
