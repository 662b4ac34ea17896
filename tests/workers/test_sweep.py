"""Sweeps on two local workers of Ray have the values, bit for bit, of the local engine, whatever dies on the way.

Needs the extra `ray`.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from hooklens import patching
from hooklens.hooks import edits
from hooklens.patching import SweepInterruptedError
from hooklens.workers import ray_workers
from tests.model.networks import make_model, random_tokens
from tests.workers.cluster import Mortal, cluster

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'hooklens[ray]'", allow_module_level=True)

__all__ = ["cluster"]
pytestmark = pytest.mark.usefixtures("cluster")

MODEL = make_model("grouped")
ON_RAY = {"engine": "ray", "workers": 2}
CLEAN, CORRUPTED = random_tokens(5, 7, seed=1), random_tokens(5, 7, seed=2)
GRID = patching.grid("z", positions="each")
METRICS = {"difference": patching.LogitDiff(3, 4), "best": lambda logits: logits[:, -1].max(-1).values}


def check_same(one, other):
    for name in METRICS:
        here, there = one[name], other[name]
        assert torch.equal(here.per_pair, there.per_pair)
        assert torch.equal(here.clean_per_pair, there.clean_per_pair)
        assert torch.equal(here.corrupted_per_pair, there.corrupted_per_pair)
        assert here.stats == there.stats
        assert here.axes == there.axes


@pytest.mark.parametrize("flags", [[], ["before-0", "after-2"]])
def test_the_same_values(cluster: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    """Also where a worker dies before or behind some cells."""
    monkeypatch.setattr(ray_workers, "Holder", Mortal)
    for name in flags:
        (cluster / name).touch()
    given = {"sites": GRID, "metric": METRICS, "batch_size": 4, "progress": False}
    there = patching.sweep(MODEL, CLEAN, CORRUPTED, **given, **ON_RAY)
    assert list(cluster.iterdir()) == [], "nobody died"
    here = patching.sweep(MODEL, CLEAN, CORRUPTED, **given)
    assert here["best"].stats.forwards > 10
    check_same(here, there)


def test_a_loader_an_edit_and_another_model() -> None:
    other = make_model("grouped")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.25)
    batches = [{"clean": CLEAN[:2], "corrupted": CORRUPTED[:2]}, {"clean": CLEAN[2:], "corrupted": CORRUPTED[2:]}]
    given = {
        "sites": "resid_post", "metric": patching.LogitDiff(3, 4), "source": other, "progress": False,
        "edits": [edits.Scale("blocks.0.hook_mlp_out", 0.5)],
    }  # fmt: skip
    here = patching.sweep(MODEL, batches, **given)
    there = patching.sweep(MODEL, batches, **given, **ON_RAY)
    assert torch.equal(here.per_pair, there.per_pair)
    assert here.stats == there.stats


def test_groups_that_do_not_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for three groups: this process and two workers hold one each, so that each has a third of the pairs."""
    monkeypatch.setattr("hooklens.patching.sweeps.run.pairs_per_group", lambda *given: 6)
    given = {"sites": GRID, "metric": patching.LogitDiff(3, 4), "progress": False}
    there = patching.sweep(MODEL, CLEAN, CORRUPTED, **given, **ON_RAY)
    monkeypatch.setattr("hooklens.patching.sweeps.run.pairs_per_group", lambda *given: 2)
    here = patching.sweep(MODEL, CLEAN, CORRUPTED, **given)
    assert torch.equal(here.per_pair, there.per_pair)
    assert here.stats == there.stats


def test_functions_as_edits_run_in_full() -> None:
    halve = edits.Custom("blocks.0.hook_mlp_out", lambda tensor, hook: tensor / 2)
    given = {"sites": "resid_pre", "metric": patching.LogitDiff(3, 4), "edits": [halve], "progress": False}
    here = patching.sweep(MODEL, CLEAN, CORRUPTED, **given)
    there = patching.sweep(MODEL, CLEAN, CORRUPTED, **given, **ON_RAY)
    assert here.stats.unplanned > 0
    assert torch.equal(here.per_pair, there.per_pair)
    assert here.stats == there.stats


def test_what_fails_on_a_worker_keeps_what_was_measured() -> None:
    class Fails:
        n_called = 0

        def __call__(self, logits):
            self.n_called += 1
            if self.n_called > 4:
                raise ZeroDivisionError("in the metric")
            return logits[:, -1, 0]

    with pytest.raises(SweepInterruptedError, match="ZeroDivisionError: in the metric") as caught:
        patching.sweep(MODEL, CLEAN, CORRUPTED, GRID, Fails(), batch_size=4, progress=False, engine="ray", workers=1)
    measured = ~caught.value.result.per_pair.isnan()
    assert 0 < int(measured.sum()) < measured.numel()
