"""The forms of a report: lines of text, and a page of HTML.

The page is made of the blocks of `hooklens.display`, so it stands in a notebook as in a file, in light and in dark.
"""

import math
from typing import TYPE_CHECKING, Any

from hooklens.display import Child, Element, code, document, element, fragment, heading, note, paragraph

if TYPE_CHECKING:
    import pandas

    from hooklens.analysis.first_report.page import Finding, Report

_PROMPT = ">>> "
_STYLE = (
    ".hooklens .hl-found{font-weight:600}"
    ".hooklens .hl-part{margin-top:1.4em}"
    ".hooklens table.hl td.hl-bar{width:12em;min-width:8em}"
    ".hooklens .hl-track{position:relative;display:block;height:.8em;width:100%}"
    ".hooklens .hl-fill{position:absolute;top:0;bottom:0;border-radius:2px;background:var(--hl-for)}"
    ".hooklens .hl-fill.hl-left{background:var(--hl-against)}"
)


def format_cell(cell: Any) -> str:
    """A number in three decimals or digits, tokens by their representation, which shows spaces."""
    if isinstance(cell, tuple):
        return " ".join(map(format_cell, cell))
    if isinstance(cell, float):
        # The sign of a number that rounds to zero says nothing.
        return (f"{cell:.3f}" if abs(cell) >= 0.001 or cell == 0 else f"{cell:.1e}").replace("-0.000", "0.000")
    return str(cell)


def draw_text(report: "Report") -> str:
    """The report as lines: what stands out, the evidence in short, and the call."""
    lines = [report.headline, report.asked, *(_PROMPT + line for line in report.setup)]
    for one in report.findings:
        table = one.shown.iloc[list(one.brief)]
        lines += [f"-- {one.title}", *one.sentences, *_draw_lines(table), _PROMPT + one.code]
    return "\n".join([*lines, *(f"-- left out: {name}: {why}" for name, why in report.skipped)])


def _draw_lines(table: "pandas.DataFrame") -> list[str]:
    """A table's lines, its head first."""
    rows = [[str(column) for column in table.columns]]
    rows += [[format_cell(cell) for cell in row] for row in table.itertuples(index=False, name=None)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "   " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def draw_document(report: "Report") -> str:
    """A whole HTML document."""
    return document(report.headline, draw_page(report))


def draw_page(report: "Report") -> str:
    """The page, as a part of a document."""
    return fragment(
        element("h3", report.headline, style="font-size:1.25em"),
        paragraph(report.asked),
        code("\n".join(report.setup)),
        map(_draw_finding, report.findings),
        (note(f"Left out: {name}: {why}") for name, why in report.skipped),
        label=report.headline,
        style=_STYLE,
    )


def _draw_finding(finding: "Finding") -> Element:
    return element(
        "div",
        heading(finding.title),
        (element("p", sentence, class_="hl-found") for sentence in finding.sentences),
        _draw_table(finding.shown, finding.bars, finding.title),
        code(finding.code),
        class_="hl-part",
    )


def _draw_table(table: "pandas.DataFrame", bars: tuple[str, ...], caption: str) -> Element:
    """A table; behind each number of some columns stands a bar, to the left of the middle for negative ones.

    All bars of a table are on one scale.
    """
    columns = [str(column) for column in table.columns]
    numbers = [float(cell) for name in bars for cell in table[name]]
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0) or 1.0
    signed = any(number < 0 for number in numbers)
    kinds = ["hl-number" if _holds_numbers(table[column]) else None for column in table.columns]
    head: list[Child] = [
        [element("th", name, scope="col", class_=kind), element("th") if name in bars else None]
        for name, kind in zip(columns, kinds, strict=True)
    ]
    rows = []
    for row in table.itertuples(index=False, name=None):
        cells: list[Child] = []
        for name, kind, cell in zip(columns, kinds, row, strict=True):
            cells.append(element("td", format_cell(cell), class_=kind))
            if name in bars:
                cells.append(_draw_bar(float(cell) / largest, signed=signed))
        rows.append(element("tr", cells))
    made = element(
        "table",
        element("caption", caption, class_="hl-out"),
        element("thead", element("tr", head)),
        element("tbody", rows),
        class_="hl",
    )
    return element("div", made, class_="hl-scroll")


def _holds_numbers(column: Any) -> bool:
    return all(isinstance(cell, int | float) for cell in column.tolist())


def _draw_bar(share: float, *, signed: bool) -> Element:
    width = (50 if signed else 100) * min(1.0, abs(share)) if math.isfinite(share) else 0.0
    left = (50 - width if share < 0 else 50) if signed else 0
    fill = element(
        "span",
        class_="hl-fill hl-left" if share < 0 else "hl-fill",
        style=f"left:{left:.1f}%;width:{width:.1f}%",
    )
    return element("td", element("span", fill, class_="hl-track"), class_="hl-bar")
