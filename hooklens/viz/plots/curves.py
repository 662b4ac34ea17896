"""Curves: residual norms by layer, losses by step, one named line for each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import reads
from hooklens.display.blocks import note
from hooklens.display.elements import Child, Element, data, element
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.display.view import View
from hooklens.errors import InputError, join_names
from hooklens.optional import import_package
from hooklens.viz.charts import make_figure
from hooklens.viz.labels import for_matplotlib, for_plotly, read_labels, readable
from hooklens.viz.plots.area import PlotArea
from hooklens.viz.scale import read_script, readout, round_for_script

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

YScale = Literal["linear", "log"]

MOST_POINTS = 12_000
N_COLOURS = 8
_DASHES = (None, "6 3", "2 2", "8 3 2 3")
_MOST_DOTS = 60


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Curves(View):
    """Named lines over common places.

    Attributes:
        values: `[line place]`; NaN is a gap.
        names: of the lines.
        x: what is at each place: ascending numbers, or labels.
        x_name, y_name: the names of the axes.
        bands: by the name of a line the lower and upper ends of a band around it, `[2 place]`.
        heading: what the view shows.
        y_scale: of the vertical axis.
    """

    values: Float[Tensor, "line place"]
    names: tuple[str, ...]
    x: tuple[float, ...] | tuple[str, ...]
    x_name: str
    y_name: str
    bands: Mapping[str, Float[Tensor, "2 place"]]
    heading: str
    y_scale: YScale

    kind: ClassVar[str] = "curves"
    style: ClassVar[str] = read_asset(Path(__file__).with_name("curves.css"))
    script: ClassVar[str] = read_script(Path(__file__).with_name("curves.js"))

    @property
    def description(self) -> list[str]:
        """The places, and of each line its first, lowest, highest and last value."""
        lines = [f"{len(self.x)} places of {self.x_name or 'x'}, from {self._label(0)} to {self._label(-1)}"]
        for name, values in zip(self.names, self.values, strict=True):
            finite = values[values.isfinite()].tolist()
            told = (
                f"{format_number(finite[0])} to {format_number(finite[-1])}, lowest {format_number(min(finite))}, "
                f"highest {format_number(max(finite))}"
                if finite
                else "no value"
            )
            lines.append(f"  {readable(name)}: {told}")
        return lines

    def _label(self, place: int) -> str:
        label = self.x[place]
        return readable(label) if isinstance(label, str) else format_number(label)

    @cached_property
    def _shown(self) -> list[int]:
        """The places that are drawn: all, or every so many and the last one."""
        step = max(1, math.ceil(self.values.numel() / MOST_POINTS))
        places = list(range(0, len(self.x), step))
        return places if places[-1] == len(self.x) - 1 else [*places, len(self.x) - 1]

    def _body(self) -> list[Child]:
        drawn = torch.cat([self.values, *self.bands.values()])[:, self._shown]
        area = PlotArea.around(drawn.flatten().tolist(), self.x, is_log=self.y_scale == "log")
        drawing = element(
            "svg",
            area.draw_axes(self.x_name, self.y_name),
            (self._draw_band(area, name) for name in self.bands),
            (self._draw_line(area, line) for line in range(len(self.names))),
            element("line", class_="hl-guide", y1=area.top, y2=area.bottom),
            viewBox=f"0 0 {area.width:g} {area.height:g}",
            class_="hl-plot",
            role="img",
            tabindex=0,
            aria_label="; ".join([self.title, *(line.strip() for line in self.description[:20])]),
        )
        blocks: list[Child] = [
            element("h3", self.title),
            drawing,
            element("div", map(self._legend_of, range(len(self.names))), class_="hl-legend"),
            readout("Point at a place, or move with the arrow keys."),
            data("hl-data", self._for_script(area)),
        ]
        if len(self._shown) < len(self.x):
            told = f"{len(self._shown):,} of {len(self.x):,} places are drawn, evenly chosen; to_dataframe() has all"
            blocks.append(note(told))
        return blocks

    def _draw_line(self, area: PlotArea, line: int) -> Element:
        """A line that breaks where there is no value, with dots on its points where there are few."""
        values = self.values[line].tolist()
        points = [(area.x_of(place), area.y_of(values[place])) for place in self._shown]
        drawn = [point for point in points if point[1] is not None]
        dots = drawn if len(points) <= _MOST_DOTS else _alone(points)
        return element(
            "g",
            element("path", d=_path(points), stroke_dasharray=_DASHES[line // N_COLOURS % len(_DASHES)]),
            (element("circle", cx=f"{x:.5g}", cy=f"{y:.5g}", r=2.4) for x, y in dots),
            class_=f"hl-line hl-colour-{line % N_COLOURS}",
            data_line=line,
        )

    def _draw_band(self, area: PlotArea, name: str) -> Element:
        low, high = self.bands[name].tolist()
        ends = [(area.x_of(place), area.y_of(low[place]), area.y_of(high[place])) for place in self._shown]
        known = [(x, below, above) for x, below, above in ends if below is not None and above is not None]
        around = [(x, above) for x, _, above in known] + [(x, below) for x, below, _ in reversed(known)]
        line = self.names.index(name)
        return element(
            "polygon",
            points=" ".join(f"{x:.5g},{y:.5g}" for x, y in around),
            class_=f"hl-band hl-colour-{line % N_COLOURS}",
            data_line=line,
        )

    def _legend_of(self, line: int) -> Element:
        dash = _DASHES[line // N_COLOURS % len(_DASHES)]
        sample = element(
            "svg",
            element("line", x1=0, x2=24, y1=5, y2=5, stroke_dasharray=dash),
            viewBox="0 0 24 10",
            aria_hidden="true",
            class_=f"hl-line hl-colour-{line % N_COLOURS}",
        )
        # Buttons: a line is hidden and shown again.
        return element("button", sample, readable(self.names[line]), type="button", aria_pressed="true")

    def _for_script(self, area: PlotArea) -> dict[str, object]:
        return {
            "names": list(map(readable, self.names)),
            "x": [round_for_script(area.x_of(place)) for place in self._shown],
            "labels": [f"{self.x_name} {self._label(place)}".strip() for place in self._shown],
            "values": [[round_for_script(value) for value in row] for row in self.values[:, self._shown].tolist()],
            "width": area.width,
        }

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per place: what is there, a column for each line, and the ends of its band where it has one."""
        columns: dict[str, list[Any]] = {self.x_name or "x": list(self.x)}
        for name, values in zip(self.names, self.values, strict=True):
            columns[name] = values.tolist()
            if name in self.bands:
                columns[f"{name} low"], columns[f"{name} high"] = self.bands[name].tolist()
        table: pandas.DataFrame = import_package("pandas").DataFrame(columns)
        return table

    @property
    def _places(self) -> tuple[list[float], list[str] | None]:
        """Where places are on a figure's axis, and what is written there where that is not the number."""
        if isinstance(self.x[0], str):
            return [float(place) for place in range(len(self.x))], [readable(str(label)) for label in self.x]
        return [float(label) for label in self.x], None

    def to_matplotlib(self) -> "Figure":
        """The lines with their bands.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        figure: Figure = make_figure(7.5, 4)
        axes = figure.add_subplot()
        places, labels = self._places
        for name, values in zip(self.names, self.values, strict=True):
            marker = "o" if len(places) <= _MOST_DOTS else None
            (drawn,) = axes.plot(
                places, values.tolist(), label=for_matplotlib(readable(name)), marker=marker, markersize=3
            )
            if name in self.bands:
                low, high = self.bands[name].tolist()
                axes.fill_between(places, low, high, color=drawn.get_color(), alpha=0.2, linewidth=0)
        if labels is not None:
            step = math.ceil(len(labels) / 25)
            upright = max(map(len, labels)) * len(labels[::step]) > 80
            axes.set_xticks(places[::step], list(map(for_matplotlib, labels[::step])), rotation=90 if upright else 0)
        axes.set(
            xlabel=for_matplotlib(self.x_name),
            ylabel=for_matplotlib(self.y_name),
            title=for_matplotlib(self.title),
            yscale=self.y_scale,
        )
        axes.legend()
        return figure

    def to_plotly(self) -> Any:
        """The lines with their bands, a `plotly.graph_objects.Figure`.

        Raises:
            MissingDependencyError: plotly is not installed.
        """
        graph = import_package("plotly.graph_objects")
        places, labels = self._places
        figure = graph.Figure()
        for name, values in zip(self.names, self.values, strict=True):
            shown = for_plotly(readable(name))
            if name in self.bands:
                low, high = self.bands[name].tolist()
                edge = {"mode": "lines", "line": {"width": 0}, "legendgroup": name, "showlegend": False}
                figure.add_scatter(x=places, y=low, hoverinfo="skip", **edge)
                figure.add_scatter(
                    x=places, y=high, fill="tonexty", fillcolor="rgba(128,128,128,0.25)", hoverinfo="skip", **edge
                )
            figure.add_scatter(x=places, y=values.tolist(), name=shown, mode="lines+markers", legendgroup=name)
        ticks = {} if labels is None else {"tickvals": places, "ticktext": list(map(for_plotly, labels))}
        figure.update_xaxes(title_text=for_plotly(self.x_name), **ticks)
        figure.update_yaxes(title_text=for_plotly(self.y_name), type=self.y_scale)
        figure.update_layout(title=for_plotly(self.title))
        return figure


def _path(points: Sequence[tuple[float, float | None]]) -> str:
    """A path through the points, in pieces where one has no height."""
    pieces, is_drawn = [], False
    for x, y in points:
        if y is not None:
            pieces.append(f"{'L' if is_drawn else 'M'}{x:.5g} {y:.5g}")
        is_drawn = y is not None
    return "".join(pieces)


def _alone(points: Sequence[tuple[float, float | None]]) -> list[tuple[float, float]]:
    """The points without a neighbour, of which a line shows nothing."""
    heights = [None, *(y for _, y in points), None]
    return [
        (x, y)
        for place, (x, y) in enumerate(points)
        if y is not None and heights[place] is None and heights[place + 2] is None
    ]


@reads()
def curves(
    lines: Mapping[str, Sequence[float] | Tensor] | Tensor,
    x: Sequence[float] | Sequence[str] | Tensor | None = None,
    *,
    names: Sequence[str] | None = None,
    x_name: str = "",
    y_name: str = "",
    bands: Mapping[str, tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]] | None = None,
    y_scale: YScale = "linear",
    title: str = "curves",
) -> Curves:
    """Named lines over common places, such as norms by layer or losses by step.

    Args:
        lines: by name the values of each line, or `[line place]` (`[place]` for one). NaN is a gap.
        x: what is at each place: ascending numbers, which stand as far apart as they are, or labels, which stand
            evenly. None counts from 0.
        names: of the lines of a tensor.
        x_name: the name of the horizontal axis.
        y_name: the name of the vertical one.
        bands: by the name of a line the lower and the upper ends of a band around it.
        y_scale: `"log"` has no place for values of 0 and below; they are refused.
        title: what the view shows.

    Raises:
        InputError: lines of different lengths or none, places that are not as many or do not ascend, bands of no line,
            or values that a logarithmic scale has no place for.
    """
    read, labels = _read_lines(lines, names)
    places = _read_x(x, read.shape[1])
    if y_scale not in ("linear", "log"):
        raise InputError(f"curves: y_scale is {y_scale!r}; expected 'linear' or 'log'")
    unknown = [name for name in bands or {} if name not in labels]
    if unknown:
        raise InputError(f"curves: bands are given for {join_names(unknown)}; the lines are {join_names(labels)}")
    ends = {name: torch.stack([_read_line(end) for end in band]) for name, band in (bands or {}).items()}
    odd = [name for name, band in ends.items() if band.shape[1] != read.shape[1]]
    if odd:
        raise InputError(f"curves: the bands of {join_names(odd)} do not have the {read.shape[1]} places of the lines")
    if y_scale == "log" and any(bool((part <= 0).any()) for part in (read, *ends.values())):
        raise InputError("curves: a logarithmic scale has no place for values of 0 and below; take y_scale='linear'")
    return Curves(
        values=read,
        names=labels,
        x=places,
        x_name=x_name,
        y_name=y_name,
        bands=ends,
        heading=title,
        y_scale=y_scale,
    )


def _read_line(given: Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(given).detach().double().cpu()


def _read_lines(
    lines: Mapping[str, Sequence[float] | Tensor] | Tensor, names: Sequence[str] | None
) -> tuple[Float[Tensor, "line place"], tuple[str, ...]]:
    if isinstance(lines, Mapping):
        if names is not None:
            raise InputError("curves: names go with a tensor; a mapping has its own")
        rows, names = [_read_line(line) for line in lines.values()], list(map(str, lines))
    else:
        table = _read_line(lines)
        rows = list(table if table.ndim > 1 else table[None])
        names = [""] if names is None and len(rows) == 1 else names
    shapes = sorted({tuple(row.shape) for row in rows})
    if len(shapes) != 1 or len(shapes[0]) != 1 or not shapes[0][0]:
        raise InputError(f"curves: the lines have the shapes {shapes}; expected one length for all, not empty")
    labels = [str(place) for place in range(len(rows))] if names is None else names
    return torch.stack(rows), read_labels(labels, len(rows), subject="curves", what="lines")


def _read_x(x: Sequence[float] | Sequence[str] | Tensor | None, size: int) -> tuple[float, ...] | tuple[str, ...]:
    given = list(range(size)) if x is None else x.tolist() if isinstance(x, Tensor) else list(x)
    if len(given) != size:
        raise InputError(f"curves: x has {len(given)} places, and the lines have {size}")
    if any(isinstance(place, str) for place in given):
        return tuple(map(str, given))
    numbers = tuple(map(float, given))
    if not all(math.isfinite(number) for number in numbers) or any(
        later <= earlier for earlier, later in pairwise(numbers)
    ):
        raise InputError("curves: x does not ascend; sort the places, or give labels as text")
    return numbers
