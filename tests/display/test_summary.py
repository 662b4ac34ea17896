"""Summaries: one statement, two forms, both within their limits."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from hooklens.display import MOST_COLUMNS, MOST_LINES, Displayed, Listing, Summary, note, paragraph
from hooklens.display.summary import MOST_BYTES

TEXTS = st.text(max_size=300)


@given(
    TEXTS,
    st.dictionaries(TEXTS, TEXTS | st.none(), max_size=30),
    st.lists(st.tuples(TEXTS, st.floats(), st.none() | st.integers()), max_size=40),
    st.lists(TEXTS, max_size=4),
)
def test_both_forms_keep_their_limits(title, facts, rows, notes):
    listing = Listing(columns=("a", "b", "c"), rows=rows, n_rows=50)
    summary = Summary(title=title, facts=facts, listing=listing, notes=notes)
    lines = str(summary).split("\n")
    assert len(lines) <= MOST_LINES
    assert max(map(len, lines)) <= MOST_COLUMNS
    assert len(summary.to_html().encode()) <= MOST_BYTES


def test_the_text_counts_what_it_leaves_out():
    rows = [(f"r{number}", number) for number in range(30)]
    lines = str(Summary(title="t", listing=Listing(columns=("name", "n"), rows=rows, what="cells", n_rows=90))).split(
        "\n"
    )
    assert lines[:3] == ["t", "  name   n", "  r0     0"]
    assert len(lines) == MOST_LINES
    n_shown = len(lines) - 3
    assert lines[-1] == f"  ... {90 - n_shown} more cells; to_dataframe() has all"


def test_all_rows_stand_where_there_is_room():
    rows = [("a", 1), ("b", None)]
    assert str(Summary(title="t", facts={"x": "1", "gone": None}, listing=Listing(columns=("n", "m"), rows=rows))) == (
        "t\n  x  1\n  n  m\n  a  1\n  b"
    )
    assert str(Summary(title="t", listing=Listing(columns=("n",), rows=[]))) == "t"


def test_long_facts_go_on_below():
    lines = str(Summary(title="t", facts={"name": "word " * 60})).split("\n")
    assert lines[1].startswith("  name  word word")
    assert lines[2].startswith("        word word")
    assert len(lines) == 4


def test_parts_of_a_page_that_are_too_large_are_counted():
    large = "x" * MOST_BYTES
    summary = Summary(
        title="t", pages=[lambda: paragraph(large), lambda: (note(text) for text in "abc"), lambda: paragraph(large)]
    )
    html = summary.to_html()
    assert "2 parts of 200 kB are left out here" in html
    assert [text for text in "abc" if f'<p class="hl-note">{text}</p>' in html] == ["a", "b", "c"]
    assert "x" * 100 not in html


def test_a_page_is_made_when_it_is_asked_for():
    def fail() -> None:
        raise AssertionError("a text needs no page")

    assert str(Summary(title="t", pages=[fail])) == "t"


@dataclass(frozen=True)
class Shown(Displayed):
    """A dataclass that shows itself."""

    value: int

    def _summary(self) -> Summary:
        return Summary(title=f"Shown {self.value}")


@dataclass(frozen=True)
class Below(Shown):
    """One below it."""


def test_a_dataclass_keeps_the_form():
    """`@dataclass` wrote a form of its own over the one of the base."""
    assert repr(Shown(3)) == repr(Below(3)) == "Shown 3"
    assert "Shown 3" in Below(3)._repr_html_()
