"""The formulas of merging against loops over entries, and against what they are said to be at their ends."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.weights import merging
from hooklens.weights.merging.formulas import average, drop, merge_agreeing


def slerp(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    return merging.slerp({"w": first}, {"w": second}, t)["w"]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_average_weighs_each():
    tensors = [random(2, 3, seed=seed) for seed in range(3)]
    expected = 0.2 * tensors[0] - 1.5 * tensors[1] + 2 * tensors[2]
    torch.testing.assert_close(average(tensors, [0.2, -1.5, 2.0]), expected, rtol=1e-14, atol=1e-14)


@given(st.lists(st.lists(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0]), min_size=4, max_size=4), min_size=1))
def test_agreeing_entries(rows):
    """Where the sum is 0 no sign is elected, and nothing is added."""
    deltas = [torch.tensor(row, dtype=torch.float64) for row in rows]
    for agreement in ("mean", "sum", "max"):
        found = merge_agreeing(deltas, agreement)
        for place in range(4):
            column = [row[place] for row in rows]
            sign = math.copysign(1, sum(column)) if sum(column) else 0
            agreeing = [entry for entry in column if entry * sign > 0]
            expected = {
                "mean": sum(agreeing) / max(1, len(agreeing)),
                "sum": sum(agreeing),
                "max": sign * max(map(abs, agreeing), default=0.0),
            }[agreement]
            assert float(found[place]) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_stays_on_the_arc(t):
    """At a share of the angle, as long as between the two where both have one length."""
    first, second = random(5), random(5, seed=1)
    second *= first.norm() / second.norm()
    found = slerp(first, second, t)
    angle = torch.arccos(first @ second / first.norm() ** 2)
    assert float(found.norm()) == pytest.approx(float(first.norm()))
    assert float(torch.arccos(found @ first / first.norm() ** 2)) == pytest.approx(float(t * angle), abs=1e-7)


@pytest.mark.parametrize("second", [2.0, 0.0, -1.0, 1.0 + 1e-12])
def test_slerp_of_vectors_without_an_arc_is_the_line_between_them(second):
    first = random(5)
    torch.testing.assert_close(slerp(first, second * first, 0.25), first * (0.75 + 0.25 * second), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rescale", [False, True])
def test_dropping_keeps_the_mean_where_it_rescales(rescale):
    delta = torch.full((200, 200), 2.0, dtype=torch.float64)
    dropped = drop(delta, 0.75, torch.Generator().manual_seed(0), rescale=rescale)
    share = float((dropped != 0).double().mean())
    # Five standard deviations of 40,000 draws.
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 40_000)
    assert dropped.unique().tolist() == [0.0, 8.0 if rescale else 2.0]
