"""Networks of any combination of options pass `verify`: what it expects of a sound network is what a sound one does.

`HOOKLENS_RANDOM_NETWORKS` says how many are drawn, anew in each run; the default is a few, always the same.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import (
    HookedConfig,
    LearnedPositions,
    MLAConfig,
    NoPositions,
    NormConfig,
    PartConfig,
    RotaryPositions,
    ShortformerPositions,
    SinusoidalPositions,
)
from hooklens.verification.comparing.ways import ways_to_run
from hooklens.verification.probe import make_probe
from tests.annotations import unchecked
from tests.combinations.cases import draw_config
from tests.model.networks import ATTENTION, RMS_NORM, make_config, make_model
from tests.verification.networks import verify_points

N_NETWORKS = int(os.environ.get("HOOKLENS_RANDOM_NETWORKS", "6"))
# Enough for caches and padding inside rows at the longer of the two.
N_TOKENS = st.sampled_from([6, 8])

# What was found by drawing.
FOUND = {
    "an activation that is the identity": make_config(n_layers=1, act_fn="identity"),
    "queries that see one key": make_config(n_layers=1, windows=(1,), qk_norm=RMS_NORM),
    "queries that turn and see one key": make_config(n_layers=1, windows=(1,), positions=RotaryPositions(dim=6)),
    "chunks of one key": make_config(n_layers=1, chunks=(1,)),
    "sinks beside one key": make_config(n_layers=1, windows=(1,), attn_sinks=True),
    "a chunk where nothing attends": make_config(attn=(ATTENTION, None), chunks=(None, 3)),
}


@st.composite
def draw_network(draw) -> HookedConfig:
    # As for cases: the check of annotations would be another source of chance.
    with unchecked():
        cfg = draw(draw_config())
        return draw(draw_latents(cfg)) if draw(st.integers(0, 2)) == 0 else cfg


@st.composite
def draw_latents(draw, cfg: HookedConfig) -> HookedConfig:
    """The network with latent attention in all layers that attend, or in some, without what does not go with it."""
    latent = MLAConfig(
        q_rank=draw(st.sampled_from([None, 3])),
        kv_rank=draw(st.sampled_from([2, 5])),
        d_nope=draw(st.integers(1, 3)),
        d_rope=2,
        d_head_v=draw(st.sampled_from([1, 4, 6])),
        norm_eps=draw(st.sampled_from([1e-6, 0.1])),
    )
    attn: list[PartConfig | None] = []
    positions: list[Any] = []
    for block in cfg.blocks:
        part = latent if block.attn is not None and (not attn or draw(st.booleans())) else block.attn
        turns = block.positions.__class__ is RotaryPositions and block.positions.dim == latent.d_rope
        attn.append(part)
        positions.append(block.positions if turns or part is not latent else draw(st.sampled_from(_OF_LATENTS)))
    at_once = isinstance(cfg.positions, LearnedPositions | SinusoidalPositions | NoPositions)
    return cfg.replace(
        attn=tuple(attn),
        positions=cfg.positions if at_once else tuple(_for_each_layer(one, latent.d_head) for one in positions),
        d_head=latent.d_head,
        n_kv_heads=cfg.n_heads,
        clip_qkv=None,
        qk_norm=None,
        qk_norm_over="head",
        qk_norm_per_head=False,
        qk_norm_after_rotary=False,
        v_bias=cfg.qkv_bias if cfg.k_bias is None else cfg.k_bias,
    )


_OF_LATENTS = (NoPositions(), RotaryPositions(dim=2), RotaryPositions(dim=2, base=20.0, layout="interleaved"))


def _for_each_layer(positions: Any, d_head: int) -> Any:
    """Positions as one layer can have them: shortformer ones are a table for all, rotary ones may be too wide."""
    if isinstance(positions, RotaryPositions) and positions.dim > d_head:
        return _OF_LATENTS[1]
    return NoPositions() if isinstance(positions, ShortformerPositions) else positions


@pytest.mark.long
@settings(max_examples=N_NETWORKS, derandomize="HOOKLENS_RANDOM_NETWORKS" not in os.environ)
@given(draw_network(), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 10**6), N_TOKENS)
def test_any_network_passes(cfg: HookedConfig, dtype: torch.dtype, seed: int, n_tokens: int) -> None:
    with unchecked():
        report = verify_points(make_model(cfg, dtype=dtype, seed=seed), n_tokens=n_tokens)
    assert report.passed, str(report)


@pytest.mark.parametrize("name", FOUND)
def test_what_drawing_found_passes(name: str) -> None:
    """Sound networks failed, or one was not: neurons behind the identity were edited together with what made them.

    Edits were expected to pass a softmax over one key; of what that softmax hides, rounding was expected to be as small
    as that of the logits; and positions were given to networks that read none.
    """
    report = verify_points(make_model(FOUND[name]), n_tokens=6)
    assert report.passed, str(report)


def test_positions_are_given_where_something_reads_them() -> None:
    """What a layer without attention says of windows made the verification give positions, which were refused."""
    labels = {}
    for name in ("a chunk where nothing attends", "queries that see one key"):
        probe = make_probe(make_model(FOUND[name]), n_tokens=6)
        labels[name] = any("n_ctx" in way.label for way in ways_to_run(probe))
    assert labels == {"a chunk where nothing attends": False, "queries that see one key": True}


def test_a_size_that_later_norms_take_out_is_not_missed() -> None:
    """A sound network failed: a denominator was doubled, and behind maps without biases only its sign moves logits."""
    cfg = make_config(
        n_layers=3, attn=None, mlp_bias=False, act_fn="relu", norm_before=False, norm_stream=True,
        norm=NormConfig(kind="rms", eps=1e-5, bias=False, unit_offset=True), norm_after=(True, True, False),
        final_norm=NormConfig(kind="layer", eps=1e-5, unit_offset=True), positions=NoPositions(), unembed_bias=False,
    )  # fmt: skip
    for seed in range(4):
        report = verify_points(make_model(cfg, dtype=torch.float32, seed=seed), n_tokens=8)
        assert report.passed, str(report)
