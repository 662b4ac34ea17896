"""Numbers as displays write them."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens.display import diverging, format_bytes, format_count, format_number, format_shape, sequential, visible


# Of the very largest numbers three digits may be beyond the largest of all.
@given(st.floats(-1e300, 1e300))
def test_three_digits_are_kept(number):
    """Half of the last of three digits is at most 0.5 % of the number."""
    read = float(format_number(number).replace(",", ""))
    assert math.isclose(read, number, rel_tol=0.00501)


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0.0"), (-0.0, "0.0"), (7, "7"), (1234567, "1,234,567"), (0.012, "0.0120"), (-3.4, "-3.40"),
     (1.2e-7, "1.20e-07"), (123456.0, "123,456"), (float("nan"), "nan"), (float("-inf"), "-inf")],
)  # fmt: skip
def test_numbers(number, text):
    assert format_number(number) == text


def test_counts_bytes_and_shapes():
    assert [format_count(n) for n in (0, 9999, 85_056_000, 6_740_000_000, 2 * 10**12)] == [
        "0", "9,999", "85.1 M", "6.74 B", "2 T",
    ]  # fmt: skip
    assert [format_bytes(n) for n in (0, 999, 5720, 3 * 10**12)] == ["0 B", "999 B", "5.72 kB", "3 TB"]
    assert format_shape((1, 15), ("batch", "pos")) == "batch 1 x pos 15"
    assert format_shape([]) == ""


@given(st.floats(), st.floats(0))
def test_every_number_has_a_colour(value, largest):
    for style in (sequential(value, largest), diverging(value, largest)):
        assert style.startswith("background:")
        assert "nan" not in style


def test_larger_values_are_deeper_and_signs_differ():
    assert diverging(0.5, 1.0) != diverging(-0.5, 1.0)
    assert sequential(0.5, 1.0) == diverging(0.5, 1.0)
    assert sequential(2.0, 1.0) == sequential(1.0, 1.0) != sequential(0.5, 1.0)


def test_labels():
    assert visible(" John\n") == "\N{MIDDLE DOT}John\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
    assert visible("abcdef", 4) == "abc\N{HORIZONTAL ELLIPSIS}"
