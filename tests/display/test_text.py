"""Plain text: lines that stay lines, columns, and what is left out."""

from hypothesis import given
from hypothesis import strategies as st

from hooklens.display import MOST_COLUMNS, MOST_LINES, clip, columns, flatten, one_line, shorten


@given(st.text())
def test_a_flat_text_is_one_line(text):
    assert len(flatten(text).splitlines()) <= 1
    assert len(flatten(text)) == len(text)
    flatten(text).encode("utf-8")


@given(st.text(), st.integers(2, 30))
def test_a_clipped_text_says_that_it_is(text, most):
    short = clip(text, most)
    assert len(short) <= most
    assert (short == text) == (len(text) <= most)
    assert len(text) <= most or short.endswith("\N{HORIZONTAL ELLIPSIS}")


def test_one_line():
    assert one_line("a\nb") == "a\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}b"
    assert len(one_line("a" * 500)) == MOST_COLUMNS


def test_columns_are_as_wide_as_their_widest_cell():
    assert columns([["name", "n"], ["a", "10"]], right=[1]) == ["  name   n", "  a     10"]
    assert columns([["a", ""]], indent=0) == ["a"]
    assert columns([]) == []


def test_the_last_line_counts_what_is_left_out():
    lines = [str(number) for number in range(MOST_LINES)]
    assert shorten(lines) == "\n".join(lines)
    short = shorten([*lines, "more"], what="rows", more="there").splitlines()
    assert len(short) == MOST_LINES
    assert short[-1] == "  ... 2 more rows; there"
