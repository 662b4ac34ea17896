"""Files of items scored on two local workers of Ray have the bytes that the local engine writes.

Needs the extra `ray`.
"""

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest

from hooklens.errors import WorkerError
from hooklens.evaluation import score_file
from hooklens.workers import ray_workers
from hooklens.workers.holder import Holder
from tests.evaluation.networks import PREFIX, reader
from tests.evaluation.test_stream import LINES
from tests.workers.cluster import Mortal, cluster

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'hooklens[ray]'", allow_module_level=True)

__all__ = ["cluster"]
pytestmark = pytest.mark.usefixtures("cluster")

ON_RAY = {"engine": "ray", "workers": 2}


@pytest.fixture
def items(tmp_path: Path) -> Path:
    path = tmp_path / "items.jsonl"
    lines = [{**line, "id": f"{line['id']} {copy}"} for copy in range(6) for line in LINES]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize("flags", [[], ["before-1", "after-3"]])
def test_the_same_results(
    items: Path, tmp_path: Path, cluster: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.setattr(ray_workers, "Holder", Mortal)
    for name in flags:
        (cluster / name).touch()
    given = {"prefix": PREFIX, "batch_size": 3, "progress": False}
    there = score_file(reader(), items, tmp_path / "there.jsonl", **given, **ON_RAY)
    assert list(cluster.iterdir()) == [], "nobody died"
    here = score_file(reader(), items, tmp_path / "here.jsonl", **given)
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert there == here


class Doomed(Holder):
    """Dies at one question, whoever has it."""

    def run(self, task, begun, shared):
        if task[0].item.id == "3 2":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().run(task, begun, shared)


def test_an_item_at_which_every_worker_dies_ends_the_run(
    items: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    given = {"prefix": PREFIX, "batch_size": 3, "progress": False}
    with monkeypatch.context() as patch:
        patch.setattr(ray_workers, "Holder", Doomed)
        with pytest.raises(WorkerError, match=r"score_file: 3 workers died at the same task, .*; give fewer workers"):
            score_file(reader(), items, out, **given, **ON_RAY)
    # All continuations, which come first, and two questions of each of the first two copies.
    assert len(out.read_text().splitlines()) == 6 * 4 + 2 * 2
    assert score_file(reader(), items, out, **given, **ON_RAY).n_found == 28
    score_file(reader(), items, tmp_path / "here.jsonl", **given)
    assert out.read_bytes() == (tmp_path / "here.jsonl").read_bytes()
