"""Figures of results: heatmaps, curves, and lines over layers, by plotly or matplotlib, neither of them required.

Figures by matplotlib are none of pyplot's: nothing is kept open, and a notebook shows one that is a cell's value.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any, Literal

from torch import Tensor

from hooklens.errors import HookLensError
from hooklens.optional import import_package

CROSS = "\N{MULTIPLICATION SIGN}"

Backend = Literal["plotly", "matplotlib"]
LabelledAxis = tuple[str, list[str]]


def draw_heatmaps(
    values: Tensor,
    rows: LabelledAxis,
    columns: LabelledAxis,
    panels: Sequence[str],
    *,
    backend: Backend,
    title: str,
    marks: Tensor | None = None,
) -> Any:
    """Heatmaps beside each other on one scale, white at 0.

    Args:
        values: `[panel row column]`.
        rows: the name of the rows' axis, and what is written at each row.
        columns: the same of columns.
        panels: what is written above each panel.
        backend: the package that draws.
        title: what stands above all.
        marks: `[panel row column]`, the cells to put a cross on.

    Raises:
        MissingDependencyError: the package is not installed.
        HookLensError: an unknown backend.
    """
    _check_backend(backend)
    if backend == "plotly":
        return _heatmaps_by_plotly(values, rows, columns, panels, title, marks)
    return _heatmaps_by_matplotlib(values, rows, columns, panels, title, marks)


def draw_curve(
    x: Sequence[float],
    y: Sequence[float],
    *,
    ends: tuple[Sequence[float], Sequence[float]] | None = None,
    band: tuple[str, Sequence[float], Sequence[float]] | None = None,
    labels: tuple[str, str],
    level: float,
    backend: Backend,
    title: str,
) -> Any:
    """A curve over a logarithmic axis, and a dotted line to compare it with.

    Args:
        x: places, all above 0.
        y: values.
        ends: the lower and the upper ends of bars through the values.
        band: a band to compare the curve with: its name, its lower and its upper ends.
        labels: the names of both axes.
        level: where the dotted line is.
        backend: the package that draws.
        title: what stands above.

    Raises:
        MissingDependencyError: the package is not installed.
        HookLensError: an unknown backend.
    """
    _check_backend(backend)
    below, above = _bars(y, ends)
    if backend == "plotly":
        graph = import_package("plotly.graph_objects")
        bars = None if ends is None else {"array": above, "arrayminus": below, "symmetric": False}
        curve = graph.Scatter(x=list(x), y=list(y), error_y=bars, mode="lines+markers", showlegend=False)
        figure = graph.Figure([curve, *_band_by_plotly(graph, x, band)])
        figure.add_hline(y=level, line_dash="dot")
        figure.update_xaxes(title_text=labels[0], type="log")
        figure.update_yaxes(title_text=labels[1])
        figure.update_layout(title=title)
        return figure
    figure = make_figure(6, 4)
    axes = figure.add_subplot()
    axes.errorbar(x, y, yerr=None if ends is None else [below, above], marker="o")
    if band is not None:
        axes.fill_between(x, band[1], band[2], color="gray", alpha=0.3, label=band[0])
        axes.legend()
    axes.axhline(level, linestyle=":", color="gray")
    axes.set(xscale="log", xlabel=labels[0], ylabel=labels[1], title=title)
    return figure


def _band_by_plotly(
    graph: Any, x: Sequence[float], band: tuple[str, Sequence[float], Sequence[float]] | None
) -> list[Any]:
    """An invisible line along the lower ends, and one along the upper ends that is filled down to it."""
    if band is None:
        return []
    name, low, high = band
    edge = {"mode": "lines", "line": {"width": 0}, "legendgroup": name}
    return [
        graph.Scatter(x=list(x), y=list(low), showlegend=False, hoverinfo="skip", **edge),
        graph.Scatter(x=list(x), y=list(high), name=name, fill="tonexty", fillcolor="rgba(128,128,128,0.3)", **edge),
    ]


def draw_lines(
    x: LabelledAxis,
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    *,
    backend: Backend,
    title: str,
) -> Any:
    """Lines over common places, one panel beside the other for each quantity, each on a scale of its own.

    Args:
        x: the name of the horizontal axis, and what is written at each place.
        panels: by what is written above, the lines by name, with a value for each place; NaN is a gap.
        backend: the package that draws.
        title: what stands above all.

    Raises:
        MissingDependencyError: the package is not installed.
        HookLensError: an unknown backend.
    """
    _check_backend(backend)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    draw = _lines_by_plotly if backend == "plotly" else _lines_by_matplotlib
    return draw(x, panels, names, title)


def _lines_by_plotly(
    x: LabelledAxis, panels: Mapping[str, Mapping[str, Sequence[float]]], names: list[str], title: str
) -> Any:
    figure = import_package("plotly.subplots").make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels))
    scatter = import_package("plotly.graph_objects").Scatter
    palette = import_package("plotly.colors").qualitative.Plotly
    shown: set[str] = set()
    for column, lines in enumerate(panels.values(), start=1):
        for name, values in lines.items():
            colour = palette[names.index(name) % len(palette)]
            line = scatter(
                x=list(range(len(x[1]))),
                y=list(values),
                name=name,
                mode="lines+markers",
                line={"color": colour},
                legendgroup=name,
                showlegend=name not in shown,
            )
            shown.add(name)
            figure.add_trace(line, row=1, col=column)
        figure.update_xaxes(_plotly_axis(x), row=1, col=column)
    figure.update_layout(title=title)
    return figure


def _lines_by_matplotlib(
    x: LabelledAxis, panels: Mapping[str, Mapping[str, Sequence[float]]], names: list[str], title: str
) -> Any:
    figure = make_figure(4 * len(panels) + 1, 4)
    places = list(range(len(x[1])))
    drawn: dict[str, Any] = {}
    for number, (panel, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for name, values in lines.items():
            (line,) = axes.plot(places, list(values), marker="o", label=name, color=f"C{names.index(name)}")
            drawn.setdefault(name, line)
        axes.set(title=panel, xlabel=x[0])
        axes.set_xticks(places, x[1])
    figure.legend(handles=list(drawn.values()), loc="outside lower center", ncols=len(drawn))
    figure.suptitle(title)
    return figure


def _bars(y: Sequence[float], ends: tuple[Sequence[float], Sequence[float]] | None) -> tuple[list[float], list[float]]:
    """How far bars go down and up from the values, which may lie outside of a skewed interval."""
    low, high = ends or (y, y)
    below = [max(0.0, value - end) for value, end in zip(y, low, strict=True)]
    above = [max(0.0, end - value) for value, end in zip(y, high, strict=True)]
    return below, above


def _check_backend(backend: Backend) -> None:
    if backend not in ("plotly", "matplotlib"):
        raise HookLensError(f"plot: backend is {backend!r}; expected 'plotly' or 'matplotlib'")


def _heatmaps_by_plotly(
    values: Tensor, rows: LabelledAxis, columns: LabelledAxis, panels: Sequence[str], title: str, marks: Tensor | None
) -> Any:
    figure = import_package("plotly.subplots").make_subplots(rows=1, cols=len(panels), subplot_titles=panels)
    heatmap = import_package("plotly.graph_objects").Heatmap
    for column, panel in enumerate(values, start=1):
        # Places are numbers, since labels may repeat.
        written = {}
        if marks is not None:
            crosses = [[CROSS if marked else "" for marked in row] for row in marks[column - 1].tolist()]
            written = {"text": crosses, "texttemplate": "%{text}"}
        figure.add_trace(heatmap(z=panel.tolist(), coloraxis="coloraxis", **written), row=1, col=column)
        figure.update_xaxes(_plotly_axis(columns), row=1, col=column)
        figure.update_yaxes({**_plotly_axis(rows), "autorange": "reversed"}, row=1, col=column)
    figure.update_layout(title=title, coloraxis={"colorscale": "RdBu", "cmid": 0.0})
    return figure


def _plotly_axis(axis: LabelledAxis) -> dict[str, Any]:
    name, labels = axis
    return {"title_text": name, "tickvals": list(range(len(labels))), "ticktext": labels}


def _heatmaps_by_matplotlib(
    values: Tensor, rows: LabelledAxis, columns: LabelledAxis, panels: Sequence[str], title: str, marks: Tensor | None
) -> Any:
    figure = make_figure(5 * len(panels) + 1, 4)
    limit = float(values.nan_to_num().abs().max()) or 1.0
    for number, (panel, name) in enumerate(zip(values, panels, strict=True), start=1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.imshow(panel.numpy(), cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
        axes.set(title=name, xlabel=columns[0], ylabel=rows[0])
        for row, col in [] if marks is None else marks[number - 1].nonzero().tolist():
            axes.text(col, row, CROSS, ha="center", va="center")
        upright = max(map(len, columns[1])) > 3
        axes.set_xticks(range(len(columns[1])), columns[1], rotation=90 if upright else 0)
        axes.set_yticks(range(len(rows[1])), rows[1])
    figure.colorbar(figure.axes[-1].images[0], ax=figure.axes)
    figure.suptitle(title)
    return figure


def make_figure(width: float, height: float) -> Any:
    """An empty figure, in inches."""
    figure = import_package("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    # Only figures of pyplot show themselves in a notebook.
    figure._repr_png_ = partial(_render, figure)
    return figure


def _render(figure: Any) -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
