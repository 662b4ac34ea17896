"""What is downstream of a point follows the wiring."""

import pytest

from hooklens.verification.dataflow import downstream_of
from tests.verification.networks import build


@pytest.mark.parametrize(
    ("name", "reached", "spared"),
    [
        ("blocks.0.hook_mlp_in", "blocks.0.mlp.hook_pre", "blocks.0.hook_resid_mid"),
        ("blocks.0.hook_q_input", "blocks.0.attn.hook_pattern", "blocks.0.attn.hook_k"),
        ("blocks.1.attn.hook_v", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"),
        ("blocks.0.attn.hook_k", "blocks.0.attn.hook_k_per_head", "blocks.0.attn.hook_v_per_head"),
        ("blocks.0.attn.hook_k_per_head", "blocks.0.attn.hook_attn_scores", "blocks.0.attn.hook_rot_k"),
        ("blocks.0.attn.hook_v_per_head", "blocks.0.attn.hook_z", "blocks.0.attn.hook_pattern"),
        ("hook_pos_embed", "blocks.0.hook_resid_pre", "hook_embed"),
        ("blocks.0.hook_resid_post", "unembed.hook_out", "blocks.0.hook_mlp_out"),
    ],
)
def test_downstream_follows_the_wiring(name: str, reached: str, spared: str) -> None:
    model = build("qk-rms-norm" if "attn" in name else "learned")
    found = downstream_of(name, model.hook_points(), model.cfg)

    assert reached in found
    assert spared not in found
    assert name not in found


def test_no_sublayer_of_a_parallel_block_is_downstream_of_the_other() -> None:
    model = build("gated-shared-norm")
    names = model.hook_points()

    assert "blocks.0.hook_mlp_out" not in downstream_of("blocks.0.hook_attn_out", names, model.cfg)
    assert "blocks.0.mlp.hook_pre_linear" in downstream_of("blocks.0.ln1.hook_scale", names, model.cfg)


def test_clipping_may_hide_an_edit() -> None:
    """An edit of values that all stand at the bounds of `clip_qkv`, and still do, was reported as lost."""
    model = build("qk-norm-over-all-heads")
    names = model.hook_points()
    for source, reader in (
        ("attn.q_norm.hook_normalized", "attn.hook_rot_q"),
        ("attn.hook_k_per_head", "attn.hook_attn_scores"),
        ("ln1.hook_normalized", "attn.hook_v"),
    ):
        certain, possible = (
            downstream_of(f"blocks.0.{source}", names, model.cfg, possibly=possibly) for possibly in (False, True)
        )
        assert f"blocks.0.{reader}" in possible - certain


@pytest.mark.parametrize("reach", ["windows", "chunks"])
def test_the_weight_of_the_only_key_depends_on_nothing(reach: str) -> None:
    """An edit of the scores of queries that see one key each was expected to change the pattern."""
    names = ["blocks.0.attn.hook_pattern", "blocks.1.attn.hook_pattern"]
    for sinks in (False, True):
        cfg = build("sinks").cfg.replace(**{"windows": None, reach: (1, None)}, attn_sinks=sinks)
        found = downstream_of("blocks.0.attn.hook_attn_scores", names, cfg, possibly=True)
        assert found == set(names[0 if sinks else len(names) :])
