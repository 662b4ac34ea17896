"""Displays as plain text: a `repr` has at most twenty lines, and says what it leaves out."""

from collections.abc import Sequence

MOST_LINES = 20


def columns(rows: Sequence[Sequence[str]], *, indent: int = 2, gap: int = 2, right: Sequence[int] = ()) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest cell.

    Args:
        rows: as many cells in each.
        indent: spaces before each line.
        gap: spaces between columns.
        right: the columns whose cells stand at the right.
    """
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + (" " * gap).join(cells)).rstrip())
    return lines


def shorten(lines: Sequence[str], most: int = MOST_LINES, *, what: str = "lines", more: str = "") -> str:
    """Lines as one text of at most `most`; where there are more, the last line counts those left out.

    Args:
        lines: all lines.
        most: the most to write.
        what: what a line is one of.
        more: where the rest is to be found: `"to_dataframe() has all"`.
    """
    if len(lines) <= most:
        return "\n".join(lines)
    left_out = len(lines) - most + 1
    told = f"  ... {left_out:,} more {what}" + (f"; {more}" if more else "")
    return "\n".join([*lines[: most - 1], told])
