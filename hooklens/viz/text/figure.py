"""Coloured text as a figure of matplotlib, in lines of letters of one width."""

import math
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hooklens.display.colours import MOST_OPAQUE, PRINTED_AGAINST, PRINTED_FOR
from hooklens.display.labels import visible
from hooklens.optional import import_package
from hooklens.viz.charts import make_figure
from hooklens.viz.labels import for_matplotlib
from hooklens.viz.scale import Scale, furthest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LINE_WIDTH = 90
"""Letters of a line."""

_FONT_SIZE = 10
# DejaVu Sans Mono, which comes with matplotlib: a letter is 0.602 of the font's size wide, in points of 1/72 inch.
_LETTER = 0.602 * _FONT_SIZE / 72
_LINE = 1.9 * _FONT_SIZE / 72


def draw_text(tokens: Sequence[str], values: Sequence[float], *, scale: Scale, title: str) -> "Figure":
    """A text with a coloured ground behind each token.

    Args:
        tokens: of the text.
        values: one for each; NaN has no colour.
        scale: of the colours.
        title: what stands above.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    placed, n_lines = _place(tokens)
    figure: Figure = make_figure(LINE_WIDTH * _LETTER + 0.3, n_lines * _LINE + 0.9)
    axes = figure.add_subplot()
    axes.set(xlim=(0, LINE_WIDTH), ylim=(n_lines, 0), title=for_matplotlib(title))
    axes.set_axis_off()
    largest = furthest(values)
    rectangle = import_package("matplotlib.patches").Rectangle
    for place, column, line, text in placed:
        value = values[place]
        if math.isfinite(value):
            axes.add_patch(
                rectangle(
                    (column, line + 0.08), _width(text), 0.84, facecolor=_colour(value, largest, scale), linewidth=0
                )
            )
        axes.text(column, line + 0.5, for_matplotlib(text), family="DejaVu Sans Mono", fontsize=_FONT_SIZE, va="center")
    colours = [_colour(step / 8, 1.0, scale) for step in range(-8 if scale == "signed" else 0, 9)]
    colour_map = import_package("matplotlib.colors").LinearSegmentedColormap.from_list("hooklens", colours)
    norm = import_package("matplotlib.colors").Normalize(-largest if scale == "signed" else 0.0, largest or 1.0)
    mappable = import_package("matplotlib.cm").ScalarMappable(norm, colour_map)
    figure.colorbar(mappable, ax=axes, orientation="horizontal", shrink=0.4, aspect=30, anchor=(0.0, 0.5))
    return figure


def _place(tokens: Sequence[str]) -> tuple[list[tuple[int, int, int, str]], int]:
    """The pieces of tokens with token, column and line of each, and the number of lines."""
    pieces, column, line = [], 0, 0
    for place, token in enumerate(tokens):
        for part in token.splitlines(keepends=True) or [""]:
            text = visible(part)
            if column and column + _width(text) > LINE_WIDTH:
                column, line = 0, line + 1
            for start in range(0, max(1, len(text)), LINE_WIDTH):
                column, line = (0, line + 1) if start else (column, line)
                pieces.append((place, column, line, text[start : start + LINE_WIDTH]))
                column += _width(pieces[-1][3])
            if part.endswith("\n"):
                column, line = 0, line + 1
    return pieces, line + 1


def _width(text: str) -> int:
    """Letters' widths that a text takes: those of East Asia and emoji are two wide."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)


def _colour(value: float, largest: float, scale: Scale) -> tuple[float, float, float, float]:
    share = value / largest if largest else 0.0
    hue = PRINTED_AGAINST if scale == "signed" and share < 0 else PRINTED_FOR
    red, green, blue = (part / 255 for part in hue)
    return red, green, blue, MOST_OPAQUE * min(1.0, abs(share) if scale == "signed" else max(0.0, share))
