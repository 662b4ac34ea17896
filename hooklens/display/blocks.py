"""The blocks of a display: headings, facts, tables, things that fold."""

from collections.abc import Iterable, Mapping, Sequence

from hooklens.display.elements import Child, Element, element
from hooklens.display.numbers import format_number

Cell = str | int | float | bool | None | Element
MOST_ROWS = 200


def heading(text: str, *more: Child) -> Element:
    """The title of a display, with whatever stands on its line."""
    return element("h3", text, more)


def paragraph(*children: Child) -> Element:
    """A paragraph."""
    return element("p", children)


def note(text: str) -> Element:
    """A remark in small, faint letters: what is left out, how to read the rest."""
    return element("p", text, class_="hl-note")


def code(text: str) -> Element:
    """Lines of code."""
    return element("pre", element("code", text))


def facts(named: Mapping[str, Child]) -> Element:
    """Names and what stands for each, in two columns."""
    return element(
        "dl",
        ([element("dt", name), element("dd", value)] for name, value in named.items()),
        class_="hl-facts",
    )


def fold(summary: Child, *children: Child, is_open: bool = False) -> Element:
    """A line that opens and closes what stands below it, by mouse and by keyboard."""
    return element("details", element("summary", summary), children, open=is_open)


def table(
    names: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    caption: str,
    most: int = MOST_ROWS,
    styles: Mapping[tuple[int, int], str] | None = None,
    more: str = "",
) -> list[Element]:
    """A table, and a note of the rows that are left out.

    Columns of numbers stand at the right; the first column names the row.

    Args:
        names: of the columns.
        rows: their cells; numbers are written in three significant digits.
        caption: what the table shows, for those who do not see it.
        most: the most rows to write.
        styles: by row and column, the style of a cell.
        more: where the rows left out are to be found: `"to_dataframe() has all"`.
    """
    shown = rows[:most]
    numeric = [
        all(isinstance(row[place], int | float) and not isinstance(row[place], bool) for row in shown) and bool(shown)
        for place in range(len(names))
    ]
    head = [
        element("th", name, scope="col", class_="hl-number" if is_number else None)
        for name, is_number in zip(names, numeric, strict=True)
    ]
    styles = styles or {}
    body = [
        element("tr", _cells(row, numeric, [styles.get((line, place)) for place in range(len(row))]))
        for line, row in enumerate(shown)
    ]
    made = element(
        "table",
        element("caption", caption, class_="hl-out"),
        element("thead", element("tr", head)),
        element("tbody", body),
        class_="hl",
    )
    blocks = [element("div", made, class_="hl-scroll")]
    if len(rows) > most:
        told = f"{len(rows) - most:,} of {len(rows):,} rows are left out" + (f"; {more}" if more else "")
        blocks.append(note(told))
    return blocks


def _cells(row: Sequence[Cell], numeric: Sequence[bool], styles: Iterable[str | None]) -> Iterable[Element]:
    for place, (cell, is_number, style) in enumerate(zip(row, numeric, styles, strict=True)):
        tag, scope = ("th", "row") if place == 0 else ("td", None)
        yield element(
            tag,
            cell if isinstance(cell, Element) else write_cell(cell),
            scope=scope,
            style=style,
            class_="hl-number" if is_number else None,
        )


def write_cell(cell: str | int | float | bool | None) -> str:
    """What a cell says: numbers in three significant digits, True and False as yes and no, None as nothing."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int | float):
        return format_number(cell)
    return cell
