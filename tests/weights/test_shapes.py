import pytest
import torch

from hooklens.config import LearnedPositions
from hooklens.errors import CheckpointError
from hooklens.weights.shapes import check_state, weight_shapes
from tests.weights.reference_network import CONFIGS, RMS_NORM, make_config, random_state


def test_shapes_with_every_part():
    cfg = make_config(
        n_layers=1,
        n_kv_heads=2,
        gated_mlp=True,
        norm_after=True,
        qk_norm=RMS_NORM,
        positions=LearnedPositions(offset=2),
        unembed_bias=True,
    )
    block = {
        "ln1.w": (12,), "ln1.b": (12,), "ln2.w": (12,), "ln2.b": (12,),
        "ln1_post.w": (12,), "ln1_post.b": (12,), "ln2_post.w": (12,), "ln2_post.b": (12,),
        "attn.W_Q": (4, 12, 5), "attn.W_K": (2, 12, 5), "attn.W_V": (2, 12, 5), "attn.W_O": (4, 5, 12),
        "attn.b_Q": (4, 5), "attn.b_K": (2, 5), "attn.b_V": (2, 5), "attn.b_O": (12,),
        "attn.q_norm.w": (5,), "attn.k_norm.w": (5,),
        "mlp.W_in": (12, 14), "mlp.W_gate": (12, 14), "mlp.W_out": (14, 12),
        "mlp.b_in": (14,), "mlp.b_gate": (14,), "mlp.b_out": (12,),
    }  # fmt: skip
    assert weight_shapes(cfg) == {
        "embed.W_E": (17, 12),
        "pos_embed.W_pos": (11, 12),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "ln_final.w": (12,),
        "ln_final.b": (12,),
        "unembed.W_U": (12, 17),
        "unembed.b_U": (17,),
    }


def test_shapes_with_as_little_as_possible():
    cfg = make_config(
        n_layers=1,
        wiring="parallel",
        shared_norm=True,
        norm=RMS_NORM,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_unembed=True,
    )
    block = ("ln1.w", "attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")
    expected = {"embed.W_E", "ln_final.w", "unembed.W_U", *(f"blocks.0.{name}" for name in block)}
    assert weight_shapes(cfg).keys() == expected


def test_norms_without_bias_before_and_after_each_branch():
    cfg = make_config(n_layers=1, norm=RMS_NORM, norm_after=True)
    norms = {name for name in weight_shapes(cfg) if ".ln" in name}
    assert norms == {f"blocks.0.{norm}.w" for norm in ("ln1", "ln1_post", "ln2", "ln2_post")}


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
