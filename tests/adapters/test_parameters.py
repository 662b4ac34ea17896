from hooklens.adapters import parameter_shapes
from hooklens.config import HookedConfig, LearnedPositions, NormConfig

SIZES = {
    "d_model": 6,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "d_head": 3,
    "d_mlp": 10,
    "d_vocab": 11,
    "n_ctx": 8,
}


def test_shapes_with_every_part() -> None:
    cfg = HookedConfig(
        **SIZES,
        gated_mlp=True,
        norm_after=True,
        qk_norm=NormConfig(kind="rms", eps=1e-6, bias=False),
        positions=LearnedPositions(offset=2),
        unembed_bias=True,
    )
    block = {
        "ln1.w": (6,), "ln1.b": (6,), "ln2.w": (6,), "ln2.b": (6,),
        "ln1_post.w": (6,), "ln1_post.b": (6,), "ln2_post.w": (6,), "ln2_post.b": (6,),
        "attn.W_Q": (4, 6, 3), "attn.W_K": (2, 6, 3), "attn.W_V": (2, 6, 3), "attn.W_O": (4, 3, 6),
        "attn.b_Q": (4, 3), "attn.b_K": (2, 3), "attn.b_V": (2, 3), "attn.b_O": (6,),
        "attn.q_norm.w": (3,), "attn.k_norm.w": (3,),
        "mlp.W_in": (6, 10), "mlp.W_gate": (6, 10), "mlp.W_out": (10, 6),
        "mlp.b_in": (10,), "mlp.b_gate": (10,), "mlp.b_out": (6,),
    }  # fmt: skip
    assert parameter_shapes(cfg) == {
        "embed.W_E": (11, 6),
        "pos_embed.W_pos": (10, 6),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "ln_final.w": (6,),
        "ln_final.b": (6,),
        "unembed.W_U": (6, 11),
        "unembed.b_U": (11,),
    }


def test_shapes_with_as_little_as_possible() -> None:
    cfg = HookedConfig(
        **SIZES,
        wiring="parallel",
        shared_norm=True,
        norm=NormConfig(kind="rms", eps=1e-6, bias=False),
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_unembed=True,
    )
    block = ("ln1.w", "attn.W_Q", "attn.W_K", "attn.W_V", "attn.W_O", "mlp.W_in", "mlp.W_out")
    expected = {"embed.W_E", "ln_final.w", "unembed.W_U", *(f"blocks.0.{name}" for name in block)}
    assert parameter_shapes(cfg).keys() == expected
