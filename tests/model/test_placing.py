"""Tests of hooklens.model.placing: the order, the bound and the end of what runs on threads."""

import threading

import pytest
import torch

from hooklens.model import placing
from hooklens.model.placing import Placing, run_ahead
from hooklens.weights import layout
from tests.model.networks import make_config

WEIGHT = make_config(n_layers=1).description.weights["blocks.0.attn.W_Q"]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _many_threads(monkeypatch):
    """Three threads, and tensors of a few entries worth them."""
    monkeypatch.setattr(placing, "_count_cores", lambda: 3)
    monkeypatch.setattr(layout, "HUGE_PAGE", 1)


def turned(seed):
    """A weight that lies the other way round than it is stored."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(WEIGHT.shape, generator=generator)


def test_order_and_values():
    """Long and short ones mixed."""
    given = [(n, turned(n), WEIGHT if n % 3 else None) for n in range(20)]
    assert Placing(given[1][1], WEIGHT, CPU, None).is_long()
    assert not Placing(given[0][1], None, CPU, None).is_long()
    # Rows of a larger tensor.
    assert not Placing(torch.zeros(6, 4)[::2], None, CPU, None).is_long()
    found = list(run_ahead((n, Placing(tensor, weight, CPU, None)) for n, tensor, weight in given))
    assert [n for n, _ in found] == list(range(20))
    for n, placed in found:
        expected = turned(n) if n % 3 == 0 else turned(n).movedim(-1, 1).flatten(0, 1)
        assert placed.is_contiguous()
        assert torch.equal(placed, expected)


def test_a_cast_and_a_tensor_of_inference_mode():
    with torch.inference_mode():
        made = turned(0)
    [(_, placed)] = run_ahead([(0, Placing(made, WEIGHT, CPU, torch.bfloat16))])
    assert placed.dtype == torch.bfloat16
    assert torch.equal(placed, turned(0).movedim(-1, 1).flatten(0, 1).bfloat16())
    [(_, placed)] = run_ahead([(0, Placing(made, None, CPU, None))])
    assert not placed.is_inference()


def test_few_tensors_are_on_the_way_at_a_time():
    """Each of them is there beside its source."""
    read, n_taken = 0, 0

    def placings():
        nonlocal read
        for n in range(30):
            read += 1
            assert read - n_taken <= 3 + 2
            yield n, Placing(turned(n), WEIGHT, CPU, None)

    for _ in run_ahead(placings()):
        n_taken += 1
    assert n_taken == 30


@pytest.mark.parametrize("where", ["reading", "placing", "taking"])
def test_threads_end_when_something_is_raised(where, monkeypatch):
    """An interrupt of the user among them; what was raised comes out as it is."""
    threads = threading.active_count()
    run = Placing.run

    def placings():
        for n in range(12):
            if where == "reading" and n == 5:
                raise KeyboardInterrupt
            yield n, Placing(turned(n), WEIGHT, CPU, None)

    def stumble(self):
        if torch.equal(self.tensor, turned(5)):
            raise MemoryError
        return run(self)

    if where == "placing":
        monkeypatch.setattr(Placing, "run", stumble)

    def take():
        for n, _ in run_ahead(placings()):
            if where == "taking" and n == 5:
                raise KeyboardInterrupt

    with pytest.raises(MemoryError if where == "placing" else KeyboardInterrupt):
        take()
    assert threading.active_count() == threads


def test_nothing_long_starts_no_thread():
    threads = threading.active_count()
    for _ in run_ahead((n, Placing(turned(n), None, CPU, None)) for n in range(5)):
        assert threading.active_count() == threads
