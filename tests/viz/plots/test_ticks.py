import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens.viz.plots.ticks import label_ticks, linear_ticks, log_ticks


@pytest.mark.parametrize(
    ("ends", "texts"),
    [
        ((0.0, 1.0), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        ((-3.0, 12.0), ["0", "5", "10"]),
        ((0.0, 7900.0), ["0", "2,000", "4,000", "6,000"]),
        ((0.0011, 0.0014), ["0.0011", "0.0012", "0.0013", "0.0014"]),
    ],
)
def test_marks_are_round_numbers(ends, texts):
    assert [text for _, text in linear_ticks(*ends)] == texts


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_marks_lie_between_the_ends_in_equal_steps(low, size):
    # Ends that differ by less are told apart by float64's rounding alone.
    high = low + max(size, abs(low) * 1e-6)
    places = [place for place, _ in linear_ticks(low, high)]
    assert len({text for _, text in linear_ticks(low, high)}) == len(places)
    assert 1 <= len(places) <= 6
    slack = 1e-6 * (high - low)
    assert all(low - slack <= place <= high + slack for place in places)
    steps = [later - earlier for earlier, later in pairwise(places)]
    assert all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)


def test_logarithmic_marks():
    assert [text for _, text in log_ticks(0.5, 50.0)] == ["0.5", "1", "2", "5", "10", "20", "50"]
    assert [place for place, _ in log_ticks(1e-3, 1e12)] == pytest.approx([1e-3, 1.0, 1e3, 1e6, 1e9, 1e12])
    assert [place for place, _ in log_ticks(2.0, 8.0)] == [2.0, 4.0, 6.0, 8.0]


def test_labels_stand_beside_each_other():
    labels = [f"label{place}" for place in range(10)]
    assert label_ticks(labels, 1000.0, 6.0) == [(float(place), labels[place]) for place in range(10)]
    # Ten letters with their gap of two take 60 units: four fit into 200.
    assert [place for place, _ in label_ticks(labels, 200.0, 6.0)] == [0.0, 3.0, 6.0, 9.0]
