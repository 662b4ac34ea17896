import pytest
import torch

from hooklens.config import LearnedPositions, NormConfig
from hooklens.errors import CheckpointError
from hooklens.weights.shapes import check_state, weight_shapes
from tests.weights.reference_network import CONFIGS, make_config, random_state


def test_shapes_of_a_sequential_network_with_all_biases():
    cfg = make_config(n_layers=1, n_kv_heads=2, gated_mlp=True, positions=LearnedPositions(offset=2), unembed_bias=True)
    assert weight_shapes(cfg) == {
        "embed.W_E": (17, 12),
        "pos_embed.W_pos": (11, 12),
        "blocks.0.ln1.w": (12,),
        "blocks.0.ln1.b": (12,),
        "blocks.0.attn.W_Q": (4, 12, 5),
        "blocks.0.attn.W_K": (2, 12, 5),
        "blocks.0.attn.W_V": (2, 12, 5),
        "blocks.0.attn.W_O": (4, 5, 12),
        "blocks.0.attn.b_Q": (4, 5),
        "blocks.0.attn.b_K": (2, 5),
        "blocks.0.attn.b_V": (2, 5),
        "blocks.0.attn.b_O": (12,),
        "blocks.0.ln2.w": (12,),
        "blocks.0.ln2.b": (12,),
        "blocks.0.mlp.W_in": (12, 14),
        "blocks.0.mlp.W_gate": (12, 14),
        "blocks.0.mlp.W_out": (14, 12),
        "blocks.0.mlp.b_in": (14,),
        "blocks.0.mlp.b_gate": (14,),
        "blocks.0.mlp.b_out": (12,),
        "ln_final.w": (12,),
        "ln_final.b": (12,),
        "unembed.W_U": (12, 17),
        "unembed.b_U": (17,),
    }


def test_shapes_of_a_network_without_biases_and_with_optional_norms():
    rms = NormConfig(kind="rms", eps=1e-6, bias=False)
    cfg = make_config(
        n_layers=1, norm=rms, norm_after=True, qk_norm=rms, qkv_bias=False, out_bias=False, mlp_bias=False
    )
    assert {name for name in weight_shapes(cfg) if name.startswith("blocks.")} == {
        f"blocks.0.{name}"
        for name in (
            *("ln1.w", "ln2.w", "ln1_post.w", "ln2_post.w", "attn.q_norm.w", "attn.k_norm.w"),
            *("attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out"),
        )
    }


def test_a_shared_norm_has_no_ln2():
    cfg = make_config(wiring="parallel", shared_norm=True)
    assert not any("ln2" in name for name in weight_shapes(cfg))


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_a_complete_state_passes(cfg):
    check_state(random_state(cfg), cfg)


def test_a_tied_unembedding_may_be_absent_and_positions_may_be_longer():
    cfg = make_config(positions=LearnedPositions(), tied_unembed=True)
    state = random_state(cfg)
    del state["unembed.W_U"]
    state["pos_embed.W_pos"] = torch.randn(30, cfg.d_model)
    check_state(state, cfg)


def test_all_problems_are_listed_at_once():
    cfg = make_config(positions=LearnedPositions())
    state = random_state(cfg)
    del state["unembed.W_U"], state["blocks.1.attn.b_O"]
    state["blocks.0.mlp.W_gate"] = torch.randn(12, 14)
    state["ln_final.w"] = torch.randn(11)
    state["pos_embed.W_pos"] = torch.randn(30, 11)
    state["embed.W_E"] = torch.zeros(17, 12, dtype=torch.int8)
    with pytest.raises(CheckpointError) as caught:
        check_state(state, cfg)
    text = str(caught.value)
    assert "missing: 'blocks.1.attn.b_O', 'unembed.W_U'" in text
    assert "unexpected: 'blocks.0.mlp.W_gate'" in text
    assert "ln_final.w has shape (11,); expected (12,)" in text
    assert "pos_embed.W_pos has shape (30, 11)" in text
    assert "embed.W_E has dtype torch.int8; expected floating point" in text
