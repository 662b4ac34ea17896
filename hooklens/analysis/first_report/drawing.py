"""The forms of a report: lines of text, and a page of HTML.

The page has no colours of its own but two for bars, which show on light and on dark ground, so it stands in a notebook
as in a file.
"""

import html
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from hooklens.analysis.first_report.page import Finding, Report

_PROMPT = ">>> "
_STYLE = """
.hooklens-report{font-family:system-ui,sans-serif;font-size:14px;line-height:1.45;max-width:60em;color:inherit}
.hooklens-report h2{font-size:1.25em;margin:.4em 0}
.hooklens-report h3{font-size:1.05em;margin:1.4em 0 .3em}
.hooklens-report p{margin:.25em 0}
.hooklens-report .found{font-weight:600}
.hooklens-report pre{font-size:12px;margin:.5em 0;padding:.5em .7em;overflow-x:auto;background:rgba(127,127,127,.13);
color:inherit;border-radius:4px}
.hooklens-report .scroll{overflow-x:auto}
.hooklens-report table{border-collapse:collapse;font-size:13px;margin:.5em 0;background:none;color:inherit}
.hooklens-report th,.hooklens-report td{text-align:left;padding:.15em .9em .15em 0;white-space:nowrap;background:none;
color:inherit;border:none}
.hooklens-report th{font-weight:600;border-bottom:1px solid rgba(127,127,127,.5)}
.hooklens-report th.number,.hooklens-report td.number{text-align:right;font-variant-numeric:tabular-nums}
.hooklens-report td.bar{width:12em;min-width:8em}
.hooklens-report .track{position:relative;display:block;height:.8em;width:100%}
.hooklens-report .fill{position:absolute;top:0;bottom:0;border-radius:2px}
.hooklens-report .for{background:#3b82c4}
.hooklens-report .against{background:#d9733a}
.hooklens-report .out{opacity:.75}
""".strip()
_HEAD = (
    '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
    '<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
    "<style>:root{{color-scheme:light dark}}body{{margin:2em auto;padding:0 1em;max-width:64em}}</style></head>\n"
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
    title = html.escape(report.headline)
    return f"{_HEAD.format(title=title)}<body>{draw_page(report)}</body></html>\n"


def draw_page(report: "Report") -> str:
    """The page, as a part of a document."""
    parts = [
        f'<div class="hooklens-report"><style>{_STYLE}</style>',
        f"<h2>{html.escape(report.headline)}</h2><p>{html.escape(report.asked)}</p>",
        _draw_code("\n".join(report.setup)),
        *map(_draw_finding, report.findings),
    ]
    parts += [f'<p class="out">Left out: {html.escape(name)}: {html.escape(why)}</p>' for name, why in report.skipped]
    return "\n".join([*parts, "</div>"])


def _draw_finding(finding: "Finding") -> str:
    sentences = "".join(f'<p class="found">{html.escape(sentence)}</p>' for sentence in finding.sentences)
    table = _draw_table(finding.shown, finding.bars)
    return f"<h3>{html.escape(finding.title)}</h3>{sentences}{table}{_draw_code(finding.code)}"


def _draw_code(code: str) -> str:
    return f"<pre>{html.escape(code)}</pre>"


def _draw_table(table: "pandas.DataFrame", bars: tuple[str, ...]) -> str:
    """A table; behind each number of some columns stands a bar, to the left of the middle for negative ones.

    All bars of a table are on one scale.
    """
    columns = [str(column) for column in table.columns]
    numbers = [float(cell) for name in bars for cell in table[name]]
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0) or 1.0
    signed = any(number < 0 for number in numbers)
    kinds = [' class="number"' if _holds_numbers(table[column]) else "" for column in table.columns]
    head = "".join(
        f"<th{kind}>{html.escape(name)}</th>" + ("<th></th>" if name in bars else "")
        for name, kind in zip(columns, kinds, strict=True)
    )
    rows = []
    for row in table.itertuples(index=False, name=None):
        cells = []
        for name, kind, cell in zip(columns, kinds, row, strict=True):
            cells.append(f"<td{kind}>{html.escape(format_cell(cell))}</td>")
            if name in bars:
                cells.append(_draw_bar(float(cell) / largest, signed=signed))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _holds_numbers(column: Any) -> bool:
    return all(isinstance(cell, int | float) for cell in column.tolist())


def _draw_bar(share: float, *, signed: bool) -> str:
    width = (50 if signed else 100) * min(1.0, abs(share)) if math.isfinite(share) else 0.0
    left = (50 - width if share < 0 else 50) if signed else 0
    side = "against" if share < 0 else "for"
    return (
        f'<td class="bar"><span class="track"><span class="fill {side}" '
        f'style="left:{left:.1f}%;width:{width:.1f}%"></span></span></td>'
    )
