"""Attention patterns as a figure of matplotlib: a few heads with their tokens, or many on one sheet."""

import math
from typing import TYPE_CHECKING

import torch

from hooklens.display.labels import visible
from hooklens.viz.charts import make_figure
from hooklens.viz.labels import for_matplotlib
from hooklens.viz.patterns.reading import Patterns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 4
_MOST_TICKS = 40
_SHEET_WIDTH = 10.0


def draw_attention(patterns: Patterns, *, title: str) -> "Figure":
    """Heads as heatmaps from 0 to 1, keys across and queries down.

    Args:
        patterns: of the heads.
        title: what stands above.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    draw = _draw_panels if len(patterns.heads) <= MOST_PANELS else _draw_sheet
    figure = draw(patterns)
    figure.colorbar(figure.axes[0].images[0], ax=figure.axes, shrink=0.6)
    figure.suptitle(for_matplotlib(title))
    return figure


def _draw_panels(patterns: Patterns) -> "Figure":
    n_heads, n_queries, n_keys = patterns.values.shape
    side = min(9.0, max(3.5, 1.5 + 0.16 * max(n_queries, n_keys)))
    figure: Figure = make_figure(side * n_heads + 1, side)
    for head, pattern in enumerate(patterns.values):
        axes = figure.add_subplot(1, n_heads, head + 1)
        axes.imshow(pattern.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
        axes.set(title=patterns.name(head), xlabel="key", ylabel="query")
        for ticks, labels, turned in (
            (axes.set_xticks, [patterns.key(place) for place in range(n_keys)], 90),
            (axes.set_yticks, [patterns.query(place) for place in range(n_queries)], 0),
        ):
            step = math.ceil(len(labels) / _MOST_TICKS)
            texts = [for_matplotlib(visible(token)) or str(position) for position, token in labels[::step]]
            ticks(range(0, len(labels), step), texts, rotation=turned, fontsize=8)
    return figure


def _draw_sheet(patterns: Patterns) -> "Figure":
    """All heads in one picture, a row for each layer, with gaps between them."""
    _, n_queries, n_keys = patterns.values.shape
    layers = list(dict.fromkeys(layer for layer, _ in patterns.heads))
    n_across = max(sum(layer == one for one, _ in patterns.heads) for layer in layers)
    gap = max(1, round(0.06 * max(n_queries, n_keys)))
    height, width = n_queries + gap, n_keys + gap
    sheet = torch.full((len(layers) * height - gap, n_across * width - gap), torch.nan)
    filled = dict.fromkeys(layers, 0)
    numbers: list[int] = []
    for (layer, number), pattern in zip(patterns.heads, patterns.values, strict=True):
        top, left = layers.index(layer) * height, filled[layer] * width
        sheet[top : top + n_queries, left : left + n_keys] = pattern
        filled[layer] += 1
        numbers = [*numbers, number] if layer == layers[0] else numbers
    figure: Figure = make_figure(_SHEET_WIDTH, max(2.5, 1.0 + (_SHEET_WIDTH - 2) * sheet.shape[0] / sheet.shape[1]))
    axes = figure.add_subplot()
    axes.imshow(sheet.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_facecolor("0.9")
    axes.set_xticks([place * width + n_keys / 2 for place in range(len(numbers))], list(map(str, numbers)))
    if layers == [None]:
        axes.set_yticks([])
    else:
        axes.set_yticks([place * height + n_queries / 2 for place in range(len(layers))], list(map(str, layers)))
        axes.set_ylabel("layer")
    axes.set_xlabel("head")
    return figure
