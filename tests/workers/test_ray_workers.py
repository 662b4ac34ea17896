"""Two local workers of Ray: order, errors, deaths, and what reaches them.

Needs the extra `ray`.
"""

import importlib.util
import os
import re
import time
from pathlib import Path

import pytest
import torch

from hooklens.errors import CheckpointError, InputError, WorkerError
from hooklens.workers import RayWorkers, Work, ray_workers
from tests.model.networks import make_model
from tests.workers.cluster import Mortal, cluster

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'hooklens[ray]'", allow_module_level=True)

__all__ = ["cluster"]
pytestmark = pytest.mark.usefixtures("cluster")

CPU = torch.device("cpu")


class Squares(Work):
    """Squares numbers, slowly those that come first, and says which process did it."""

    def __init__(self) -> None:
        self.add, self.n_begun = 0, 0

    def begin(self, shared):
        self.add, self.n_begun = shared, self.n_begun + 1

    def run(self, task):
        time.sleep(0.2 if task % 5 == 0 else 0.01)
        return task**2 + self.add, os.getpid(), self.n_begun, torch.get_num_threads()


class Refuses(Work):
    def run(self, task):
        if task == 3:
            raise CheckpointError("three")
        return task


class FailsEarly(Work):
    """Takes its time for the tasks before the one that fails at once."""

    def run(self, task):
        if task == 3:
            raise CheckpointError("three")
        time.sleep(0.5 if task < 3 else 0)
        return task


class Holds(Work):
    """Gives back what it holds of a model: a tensor that two names share, its strides, and whether they share still."""

    def __init__(self, model):
        self.model = model
        self.turned = next(p for p in model.parameters() if p.ndim == 2).detach().T
        self.view = self.turned[1:]

    def run(self, task):
        shares = self.view.untyped_storage().data_ptr() == self.turned.untyped_storage().data_ptr()
        return dict(self.model.state_dict()), self.turned.stride(), shares, type(self.model), self.model.training


def test_results_come_in_order_from_both() -> None:
    with RayWorkers(Squares(), device=CPU, workers=2, what="f") as team:
        first = list(team.run(range(40), shared=100))
        second = list(team.run(range(3), shared=7))
        nothing = list(team.run([]))
    assert [result for result, *_ in first] == [number**2 + 100 for number in range(40)]
    assert [result for result, *_ in second] == [7, 8, 11]
    assert nothing == []
    assert len({process for _, process, *_ in first}) == 2
    # Each worker takes up what is shared once.
    assert {n_begun for *_, n_begun, _ in first} == {1}
    assert {threads for *_, threads in first} == {torch.get_num_threads()}


def test_tasks_are_read_as_workers_become_free() -> None:
    """So that what waits takes no more memory than a few tasks."""
    read = []

    def tasks():
        for number in range(100):
            read.append(number)
            yield number

    with RayWorkers(Squares(), device=CPU, workers=2, what="f") as team:
        results = team.run(tasks())
        for _ in range(10):
            next(results)
        assert len(read) <= 10 + 8 + 1
        results.close()


def test_whatever_dies_is_done_again(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "Holder", Mortal)
    for name in ("before-0", "after-0", "after-5"):
        (cluster / name).touch()
    with RayWorkers(Squares(), device=CPU, workers=2, what="f") as team:
        found = list(team.run(range(40), shared=0))
    assert list(cluster.iterdir()) == []
    assert [result for result, *_ in found] == [number**2 for number in range(40)]


def test_errors_are_those_that_were_raised() -> None:
    with (
        RayWorkers(Refuses(), device=CPU, workers=2, what="f") as team,
        pytest.raises(CheckpointError, match=r"^three$"),
    ):
        list(team.run(range(10)))


def test_what_stands_before_an_error_is_passed_on() -> None:
    """An error of a later task was raised before results of earlier ones, which were still being computed, came."""
    with RayWorkers(FailsEarly(), device=CPU, workers=2, what="f") as team:
        results = team.run(range(20))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(CheckpointError, match=r"^three$"):
            next(results)


def test_models_arrive_bit_for_bit() -> None:
    model = make_model("grouped")
    held = Holds(model)
    with RayWorkers(held, device=CPU, workers=1, what="f") as team:
        [(state, stride, shares, kind, training)] = team.run([None])
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (stride, shares, kind, training) == (held.turned.stride(), True, type(model), False)


def test_other_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = ray_workers.describe_versions()
    monkeypatch.setattr(ray_workers, "describe_versions", lambda: {**ours, "torch": "2.0"})
    with (
        RayWorkers(Squares(), device=CPU, workers=1, what="f") as team,
        pytest.raises(WorkerError, match=f"has torch {re.escape(torch.__version__)} there and 2.0 here; install"),
    ):
        list(team.run([1]))


def test_no_gpu_is_told() -> None:
    with pytest.raises(InputError, match=r"f: no room for 1 worker: each takes a GPU, and Ray's machines have 0$"):
        RayWorkers(Squares(), device=torch.device("cuda"), workers=None, what="f")
