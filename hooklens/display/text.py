"""Displays as plain text: a `repr` has at most twenty lines, and says what it leaves out."""

from collections.abc import Sequence

MOST_LINES = 20
MOST_COLUMNS = 120

_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
# What would end a line, or move what is printed: line ends of all kinds and control characters.
_BREAKS = {
    **{code: chr(0x2400 + code) for code in range(32)},
    ord("\n"): "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}",
    127: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys((*range(128, 160), 0x2028, 0x2029), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


def flatten(text: str) -> str:
    """A text in one line: line breaks and control characters by a sign of their own."""
    return text.translate(_BREAKS)


def clip(text: str, most: int) -> str:
    """A text of at most so many characters, an ellipsis among them where something is left out."""
    return text if len(text) <= most else text[: most - 1].rstrip() + _ELLIPSIS


def one_line(text: str) -> str:
    """A text as one line of a printed form."""
    return clip(flatten(text), MOST_COLUMNS)


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
