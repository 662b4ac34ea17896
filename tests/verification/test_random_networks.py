"""Networks of any combination of options pass `verify`: what it expects of a sound network is what a sound one does.

`HOOKLENS_RANDOM_NETWORKS` says how many are drawn, anew in each run; the default is a few, always the same.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookedConfig, RotaryPositions
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
        return draw(draw_config())


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
