"""Views: tensors and labels in, pictures for notebooks and files out. None of them knows a model.

Every view shows itself in a notebook, in light and in dark; `.save("x.html")` and `.save("x.png")` write it,
`.to_matplotlib()` gives a figure, and `.to_dataframe()` the numbers.
"""

from hooklens.display import View
from hooklens.viz.circuits.view import CircuitView, circuit
from hooklens.viz.grid import Grid, grid
from hooklens.viz.head_circuit import head_circuit
from hooklens.viz.heads import heads
from hooklens.viz.lens import lens
from hooklens.viz.patterns.view import Attention, attention
from hooklens.viz.plots.bars import Bars, bars
from hooklens.viz.plots.curves import Curves, curves
from hooklens.viz.plots.norms import residual_norms
from hooklens.viz.text.tokens import Tokens, tokens

__all__ = [
    "Attention",
    "Bars",
    "CircuitView",
    "Curves",
    "Grid",
    "Tokens",
    "View",
    "attention",
    "bars",
    "circuit",
    "curves",
    "grid",
    "head_circuit",
    "heads",
    "lens",
    "residual_norms",
    "tokens",
]
