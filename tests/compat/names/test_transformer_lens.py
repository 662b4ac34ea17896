"""TransformerLens's names: those of versions 2 and 3 with their shorthands, and the bridge's against what it shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from hooklens import HookedCausalLM, HookedConfig, RotaryPositions
from hooklens.compat.names import translate
from hooklens.config import MoEConfig, NormConfig
from hooklens.errors import HookNameError
from tests.compat.names.transformers_runs import make_folder, variants_of

RMS = NormConfig(kind="rms", eps=1e-5, bias=False)
# Which of our points have the values that the bridge of TransformerLens 3.9 shows by its names, as it computed them.
TABLE: dict[str, dict[str, list[str] | None]] = json.loads(
    (Path(__file__).parent / "bridge_names.json").read_text(encoding="utf-8")
)
# Values that happen to be those of a point: the input of a table of the rotation is looked at for its dtype alone, a
# mixture's `hook_post` is what leaves it and not its neurons, and an embedding's factor moves between modules.
_BY_ACCIDENT = {"rotary_emb.hook_in", "blocks.0.mlp.hook_post", "embed.hook_out"}


def build(**options: Any) -> HookedConfig:
    given = {"d_model": 16, "n_layers": 3, "n_heads": 4, "d_vocab": 11, "n_ctx": 8, "positions": RotaryPositions(dim=4)}
    return HookedConfig(**{**given, **options})


@pytest.mark.parametrize("family", TABLE)
def test_the_bridges_names_are_points_of_equal_values_or_refused(family: str, tmp_path: Path) -> None:
    cfg = HookedCausalLM.from_config_of(make_folder(tmp_path, family, variants_of(family)[0])).cfg
    for name, equal in TABLE[family].items():
        try:
            translation = translate(name, cfg, notation="transformer_bridge")
        except HookNameError:
            # A name whose values a point has is refused for a reason that is known here.
            assert not equal or name in _BY_ACCIDENT, (name, equal)
            continue
        assert translation in cfg.description.points
        assert equal is None or translation in equal, (name, translation, equal)


def test_names_of_both_versions_are_ours() -> None:
    cfg = build()
    for name in cfg.description.points:
        if name.endswith((".hook_normalized", ".hook_in", ".hook_out")):
            continue
        translation = translate(name, cfg)
        assert (translation, translation.notation) == (name, "transformer_lens")
        assert translation == translate(name, cfg, notation="transformer_lens-2")
        assert translation.edit == ""


@pytest.mark.parametrize(
    ("shorthand", "name"),
    [
        ("k2", "blocks.2.attn.hook_k"),
        ("k2a", "blocks.2.attn.hook_k"),
        ("post1m", "blocks.1.mlp.hook_post"),
        ("scale1ln2", "blocks.1.ln2.hook_scale"),
        ("resid_pre2", "blocks.2.hook_resid_pre"),
        ("attn1", "blocks.1.attn.hook_pattern"),
        (("k", 2, "a"), "blocks.2.attn.hook_k"),
        (("mlp_post", -1), "blocks.2.mlp.hook_post"),
        (("resid_mid", 0, "block"), "blocks.0.hook_resid_mid"),
        (("embed",), "hook_embed"),
    ],
)
def test_shorthands(shorthand: Any, name: str) -> None:
    assert translate(shorthand, build()) == name


def test_normalized_means_two_tensors_where_a_layer_norm_has_weights() -> None:
    """2.x shows what the norm gives, 3.x what it divides; a translation by name alone would be wrong in one of them."""
    cfg, name = build(), "blocks.1.ln1.hook_normalized"
    with pytest.raises(HookNameError, match=r"behind its weight and bias.*say which you mean"):
        translate(name, cfg)
    with pytest.raises(HookNameError, match="behind its weight and bias"):
        translate(name, cfg, notation="transformer_lens-2")
    assert translate(name, cfg, notation="transformer_lens-3") == name
    for norm in (NormConfig(kind="layer", eps=1e-5, weight=False, bias=False), RMS):
        assert translate(name, build(norm=norm)) == name


def test_norms_behind_branches_alone_are_ln1_and_ln2_there() -> None:
    cfg = build(norm=RMS, norm_before=False, norm_after=True)
    assert translate("blocks.1.ln1.hook_scale", cfg) == "blocks.1.ln1_post.hook_scale"
    assert translate("blocks.1.ln2.hook_out", cfg) == "blocks.1.hook_mlp_out"
    assert translate("blocks.1.mlp.hook_in", cfg) == "blocks.1.hook_mlp_in"


def test_a_shared_norm_has_a_copy_there() -> None:
    cfg = build(wiring="parallel", shared_norm=True)
    translation = translate("blocks.1.ln2.hook_scale", cfg)
    assert translation == "blocks.1.ln1.hook_scale"
    assert "reaches the MLP alone" in translation.edit


def test_experts() -> None:
    cfg = build(mlp=MoEConfig(n_experts=4, experts_per_token=2, d_expert=6), gated_mlp=True)
    assert translate("blocks.0.mlp.hook_expert_indices", cfg) == "blocks.0.mlp.router.hook_choice"
    for name in ("mlp.hook_expert_weights", "mlp.experts.3.hook_post", "mlp.hook_pre"):
        with pytest.raises(HookNameError, match=r"mlp\.experts\.hook_pre|mlp\.router\.hook_logits"):
            translate(f"blocks.0.{name}", cfg)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("blocks.3.hook_resid_pre", "layer 3 is out of range"),
        ("blocks.{layer}.hook_resid_pre", "put the layer in"),
        ("hook_mlp_out", "3 layers have one of this name: put the layer in, as in 'blocks.0.hook_mlp_out'"),
        ("attn.hook_z", "put the layer in, as in 'blocks.0.attn.hook_z'"),
        ("hook_mlp", "no hook point 'hook_mlp'"),
        ("hook_pos_embed", "its positions are no vectors"),
        ("blocks.0.attn.hook_rot_x", "no hook point 'blocks.0.attn.hook_rot_x'"),
        ("blocks.0.attn.qkv.hook_out", "three maps in one"),
        ("rotary_emb.hook_cos", "table of the rotation"),
        ("blocks.0.cross_attn.hook_out", "no part with a hook point"),
        (("k", 1, "a", 4), "no shorthand"),
        (("nothing", 1), "no hook point is called 'nothing'"),
    ],
)
def test_what_is_refused_says_why(name: Any, told: str) -> None:
    with pytest.raises(HookNameError, match=told):
        translate(name, build())


def test_scores_of_the_bridge_are_masked_otherwise() -> None:
    assert "lowest finite number" in translate("blocks.0.attn.hook_attn_scores", build()).note
    with pytest.raises(HookNameError, match="lowest finite number"):
        translate("blocks.0.attn.hook_attn_scores", build(), notation="transformer_bridge")
