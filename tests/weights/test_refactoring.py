"""The circuits after refactoring against `torch.linalg.svd` of the dense ones."""

import pytest
import torch

from hooklens.config import LearnedPositions
from hooklens.weights.processing import process_weights
from hooklens.weights.refactoring import refactor_factored_attn_matrices
from tests.weights.reference_network import CONFIGS, log_probs, make_config, random_state, random_tokens

NAMES = ("sequential, tied, learned", "sequential, alibi", "sequential, no biases in the maps")


@pytest.mark.parametrize("name", NAMES)
def test_ov_circuits_are_split_along_their_singular_vectors(name):
    cfg = CONFIGS[name]
    state = random_state(cfg)
    new = refactor_factored_attn_matrices(state, cfg).state
    W_V, W_O = new["blocks.1.attn.W_V"], new["blocks.1.attn.W_O"]
    dense = state["blocks.1.attn.W_V"] @ state["blocks.1.attn.W_O"]
    torch.testing.assert_close(W_V @ W_O, dense, rtol=0, atol=1e-12)
    torch.testing.assert_close(W_O @ W_O.mT, torch.eye(cfg.d_head, dtype=torch.float64).expand(4, -1, -1))
    torch.testing.assert_close(W_V.norm(dim=1), torch.linalg.svdvals(dense)[:, : cfg.d_head])


@pytest.mark.parametrize("name", NAMES)
def test_qk_circuits_are_even_with_their_biases_as_one_more_row(name):
    cfg = CONFIGS[name]
    state = random_state(cfg)
    new = refactor_factored_attn_matrices(state, cfg).state

    def with_bias_row(weights, part):
        weight = weights[f"blocks.0.attn.W_{part}"]
        bias = weights.get(f"blocks.0.attn.b_{part}")
        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)

    dense = with_bias_row(state, "Q") @ with_bias_row(state, "K").mT
    Q, K = with_bias_row(new, "Q"), with_bias_row(new, "K")
    torch.testing.assert_close(Q @ K.mT, dense, rtol=0, atol=1e-12)
    for factor in (Q, K):
        expected = torch.diag_embed(torch.linalg.svdvals(dense)[:, : cfg.d_head])
        torch.testing.assert_close(factor.mT @ factor, expected, rtol=0, atol=1e-12)


def test_value_biases_are_folded_and_recorded():
    cfg = CONFIGS["sequential, alibi"]
    processed = refactor_factored_attn_matrices(random_state(cfg), cfg)
    assert processed.steps == ("fold_value_biases", "refactor_factored_attn_matrices")
    assert (processed.state["blocks.0.attn.b_V"] == 0).all()


def test_heads_wider_than_the_stream_keep_their_shape():
    """A circuit has at most d_model singular values; the rest of d_head is filled with zeros."""
    cfg = make_config(d_model=6, d_head=9, n_heads=2, positions=LearnedPositions())
    state, tokens = random_state(cfg), random_tokens(cfg)
    processed = process_weights(state, cfg, fold_ln=True, refactor_factored_attn_matrices=True)
    assert processed.state["blocks.0.attn.W_V"].shape == (2, 6, 9)
    assert (processed.state["blocks.0.attn.W_V"][:, :, 6:] == 0).all()
    torch.testing.assert_close(
        log_probs(processed.state, processed.cfg, tokens), log_probs(state, cfg, tokens), rtol=0, atol=1e-9
    )
