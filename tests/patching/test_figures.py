import pytest
import torch

from hooklens.errors import HookLensError
from hooklens.patching.figures import draw_curve, draw_heatmaps
from tests.annotations import unchecked

VALUES = torch.tensor([[[0.0, 1.0, -2.0]]])
AXES = {"rows": ("layer", ["0"]), "columns": ("pos", ["a", "b", "a"]), "panels": ["one"]}


def test_repeated_labels_are_columns_of_their_own():
    """Plotly merges categories of the same name, so that equal tokens shared a column."""
    figure = draw_heatmaps(VALUES, **AXES, backend="plotly", title="t")
    assert figure.data[0].x is None
    assert list(figure.layout.xaxis.ticktext) == ["a", "b", "a"]
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 2]


def test_matplotlib_figures_show_themselves_in_a_notebook():
    """A figure that is none of pyplot's was shown as text."""
    heatmap = draw_heatmaps(VALUES, **AXES, backend="matplotlib", title="t")
    curve = draw_curve([1, 10], [0.1, 0.9], labels=("edges", "kept"), level=1.0, backend="matplotlib", title="t")
    for figure in (heatmap, curve):
        assert figure._repr_png_().startswith(b"\x89PNG")
    # White is 0: the scale is the same to both sides.
    assert heatmap.axes[0].images[0].get_clim() == (-2.0, 2.0)
    assert (curve.axes[0].get_xscale(), curve.axes[0].get_xlabel()) == ("log", "edges")


def test_curves_by_plotly():
    figure = draw_curve([1, 10], [0.1, 0.9], labels=("edges", "kept"), level=1.0, backend="plotly", title="t")
    assert (list(figure.data[0].y), figure.layout.xaxis.type) == ([0.1, 0.9], "log")


def test_unknown_backends_are_named():
    with unchecked(), pytest.raises(HookLensError, match="backend is 'ascii'; expected 'plotly' or 'matplotlib'"):
        draw_heatmaps(VALUES, **AXES, backend="ascii", title="t")
