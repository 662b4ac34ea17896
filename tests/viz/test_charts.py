import pytest
import torch

from hooklens.errors import HookLensError
from hooklens.viz.charts import draw_curve, draw_heatmaps, draw_lines
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
    figure = draw_curve([1, 10], [0.1, 0.9], labels=("edges", "kept"), level=1.5, backend="plotly", title="t")
    (curve,) = figure.data
    assert (list(curve.x), list(curve.y), curve.mode) == ([1, 10], [0.1, 0.9], "lines+markers")
    assert (figure.layout.xaxis.type, figure.layout.xaxis.title.text) == ("log", "edges")
    assert (figure.layout.yaxis.type, figure.layout.yaxis.title.text) == (None, "kept")
    (level,) = figure.layout.shapes
    assert (level.y0, level.y1, level.line.dash, level.xref) == (1.5, 1.5, "dot", "x domain")
    assert figure.layout.title.text == "t"


def test_curves_by_matplotlib():
    figure = draw_curve([1, 10], [0.1, 0.9], labels=("edges", "kept"), level=1.5, backend="matplotlib", title="t")
    (axes,) = figure.axes
    curve, level = axes.lines
    assert (list(curve.get_xdata()), list(curve.get_ydata()), curve.get_marker()) == ([1, 10], [0.1, 0.9], "o")
    assert (list(level.get_ydata()), level.get_linestyle()) == ([1.5, 1.5], ":")
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("edges", "kept", "t")
    assert tuple(figure.get_size_inches()) == (6, 4)


PANELS = torch.tensor([[[0.0, 1.0, -2.0], [0.5, 0.0, 0.0]], [[0.0, 0.0, 0.25], [float("nan"), 1.5, 0.0]]])
NAMES = {"rows": ("layer", ["0", "1"]), "columns": ("pos", ["long", "b", "c"]), "panels": ["head 0", "head 1"]}


def test_panels_by_plotly():
    figure = draw_heatmaps(PANELS, **NAMES, backend="plotly", title="t")
    assert len(figure.data) == 2
    for drawn, panel, (x, y) in zip(figure.data, PANELS, [("x", "y"), ("x2", "y2")], strict=True):
        torch.testing.assert_close(torch.tensor(drawn.z), panel, rtol=0, atol=0, equal_nan=True)
        assert (drawn.xaxis, drawn.yaxis, drawn.coloraxis) == (x, y, "coloraxis")
    for x_axis, y_axis in [
        (figure.layout.xaxis, figure.layout.yaxis),
        (figure.layout.xaxis2, figure.layout.yaxis2),
    ]:
        assert (x_axis.title.text, list(x_axis.tickvals), list(x_axis.ticktext)) == (
            "pos",
            [0, 1, 2],
            NAMES["columns"][1],
        )
        assert (y_axis.title.text, list(y_axis.tickvals), list(y_axis.ticktext)) == ("layer", [0, 1], ["0", "1"])
        # The first row is on top, as in the table.
        assert (x_axis.autorange, y_axis.autorange) == (None, "reversed")
    assert [title.text for title in figure.layout.annotations] == ["head 0", "head 1"]
    # White is 0 on the one scale of all panels.
    assert figure.layout.coloraxis.cmid == 0.0
    assert figure.layout.coloraxis.colorscale[0][1] == "rgb(103,0,31)"
    assert figure.layout.title.text == "t"


def test_panels_by_matplotlib():
    figure = draw_heatmaps(PANELS, **NAMES, backend="matplotlib", title="t")
    assert len(figure.axes) == 3, "two panels and the bar of colours"
    for axes, panel, name in zip(figure.axes[:2], PANELS, NAMES["panels"], strict=True):
        (image,) = axes.images
        drawn = torch.from_numpy(image.get_array().filled(float("nan")))
        torch.testing.assert_close(drawn, panel, rtol=0, atol=0, equal_nan=True)
        assert (image.get_clim(), image.get_cmap().name, image.origin) == ((-2.0, 2.0), "RdBu", "upper")
        assert (axes.get_title(), axes.get_xlabel(), axes.get_ylabel(), axes.get_aspect()) == (
            name,
            "pos",
            "layer",
            "auto",
        )
        assert list(axes.get_xticks()) == [0, 1, 2]
        assert list(axes.get_yticks()) == [0, 1]
        assert [label.get_text() for label in axes.get_xticklabels()] == ["long", "b", "c"]
        assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    assert figure.get_suptitle() == "t"
    assert tuple(figure.get_size_inches()) == (11, 4)
    left, right = (axes.get_subplotspec().colspan.start for axes in figure.axes[:2])
    assert (left, right) == (0, 1)


@pytest.mark.parametrize(("labels", "rotation"), [(["one", "b", "c"], 0.0), (["long", "b", "c"], 90.0)])
def test_labels_stand_upright_where_they_are_long(labels, rotation):
    figure = draw_heatmaps(VALUES, ("layer", ["0"]), ("pos", labels), ["one"], backend="matplotlib", title="t")
    assert {label.get_rotation() for label in figure.axes[0].get_xticklabels()} == {rotation}


def test_zeros_have_a_scale():
    """A scale from 0 to 0 is none: matplotlib draws nothing white on it."""
    figure = draw_heatmaps(torch.zeros(1, 1, 3), **AXES, backend="matplotlib", title="t")
    assert figure.axes[0].images[0].get_clim() == (-1.0, 1.0)


def test_unknown_backends_are_named():
    with unchecked(), pytest.raises(HookLensError, match="backend is 'ascii'; expected 'plotly' or 'matplotlib'"):
        draw_heatmaps(VALUES, **AXES, backend="ascii", title="t")
    with unchecked(), pytest.raises(HookLensError, match="backend is 'ascii'; expected 'plotly' or 'matplotlib'"):
        draw_curve([1], [1.0], labels=("x", "y"), level=0.0, backend="ascii", title="t")


LINES = {"cosine": {"a - b": [1.0, 0.5], "a - c": [0.25, float("nan")]}, "kl": {"a - c": [0.0, 2.0]}}


def test_lines_by_plotly():
    figure = draw_lines(("layer", ["0", "7"]), LINES, backend="plotly", title="t")
    drawn = [(line.name, line.xaxis, list(line.x), line.mode, line.showlegend) for line in figure.data]
    assert drawn == [
        ("a - b", "x", [0, 1], "lines+markers", True),
        ("a - c", "x", [0, 1], "lines+markers", True),
        ("a - c", "x2", [0, 1], "lines+markers", False),
    ]
    assert list(figure.data[0].y) == [1.0, 0.5]
    # A line has one colour in all panels.
    assert figure.data[1].line.color == figure.data[2].line.color != figure.data[0].line.color
    assert (list(figure.layout.xaxis2.ticktext), figure.layout.xaxis2.title.text) == (["0", "7"], "layer")
    assert [title.text for title in figure.layout.annotations] == ["cosine", "kl"]
    assert figure.layout.title.text == "t"


def test_lines_by_matplotlib():
    figure = draw_lines(("layer", ["0", "7"]), LINES, backend="matplotlib", title="t")
    left, right = figure.axes
    assert [(line.get_label(), line.get_marker()) for line in left.lines] == [("a - b", "o"), ("a - c", "o")]
    assert list(right.lines[0].get_ydata()) == [0.0, 2.0]
    assert right.lines[0].get_color() == left.lines[1].get_color() != left.lines[0].get_color()
    assert (right.get_title(), right.get_xlabel(), figure.get_suptitle()) == ("kl", "layer", "t")
    assert [label.get_text() for label in right.get_xticklabels()] == ["0", "7"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a - b", "a - c"]
    with unchecked(), pytest.raises(HookLensError, match="backend is 'ascii'"):
        draw_lines(("layer", ["0"]), LINES, backend="ascii", title="t")


def test_a_line_that_the_first_panel_lacks_is_in_the_legend():
    """The legend was that of the first panel, which need not have every line."""
    panels = {"one": {"a": [1.0]}, "two": {"b": [2.0]}}
    shown = draw_lines(("x", ["0"]), panels, backend="plotly", title="t").data
    assert [line.name for line in shown if line.showlegend] == ["a", "b"]
    drawn = draw_lines(("x", ["0"]), panels, backend="matplotlib", title="t")
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b"]
