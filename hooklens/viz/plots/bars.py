"""What components add to a number, as bars: heads, neurons, latents, layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import read_int, reads
from hooklens.display.blocks import note
from hooklens.display.elements import Child, Element, element
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.display.view import View
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.viz.charts import make_figure
from hooklens.viz.labels import for_matplotlib, for_plotly, read_labels, readable

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_MOST_LABEL = 40
# What attribution's tables call that which is no component: it stays below, however large it is.
_BELOW = ("remainder", "bias")
_HUES = {True: "#2166ac", False: "#c85014"}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Bars(View):
    """Values with names as bars, the furthest from 0 first and the sum of all others below.

    Attributes:
        names: of all values.
        values: one for each name.
        k: how many bars to draw.
        heading: what the values are.
    """

    names: tuple[str, ...]
    values: Float[Tensor, " name"]
    k: int
    heading: str

    kind: ClassVar[str] = "bars"
    style: ClassVar[str] = read_asset(Path(__file__).with_name("bars.css"))

    @property
    def shown(self) -> list[tuple[str, float]]:
        """The bars with their names: the `k` values furthest from 0, then the sum of the others."""
        named = list(zip(self.names, self.values.tolist(), strict=True))
        parts = [pair for pair in named if pair[0] not in _BELOW]
        below = [pair for pair in named if pair[0] in _BELOW]
        # NaN is no distance: what has no value is among the others.
        order = sorted(parts, key=lambda pair: 0.0 if math.isnan(pair[1]) else -abs(pair[1]))
        rest = order[self.k :]
        if len(rest) == 1:
            rest = []
        summed = [(f"the other {len(rest):,}", sum(value for _, value in rest))] if rest else []
        return [*order[: len(order) - len(rest)], *summed, *below]

    @property
    def description(self) -> list[str]:
        """The bars in words."""
        return [f"  {readable(name)}: {format_number(value)}" for name, value in self.shown]

    def _body(self) -> list[Child]:
        shown = self.shown
        finite = [value for _, value in shown if math.isfinite(value)]
        ends = min(0.0, *finite, 0.0), max(0.0, *finite, 0.0)
        zero = f"--zero:{100 * _place(0.0, ends):.4g}%"
        rows = (
            element(
                "tr",
                element("th", readable(name, _MOST_LABEL), scope="row"),
                element("td", _bar(value, ends), class_="hl-track", style=zero),
                element("td", format_number(value), class_="hl-number"),
            )
            for name, value in shown
        )
        head = (element("th", text, scope="col", class_="hl-out") for text in ("name", "bar", "value"))
        made = element(
            "table",
            element("thead", element("tr", head)),
            element("tbody", rows),
            class_="hl hl-bars",
            aria_label=self.title,
        )
        blocks: list[Child] = [element("h3", self.title), element("div", made, class_="hl-scroll")]
        n_summed = len(self.names) - sum(name in _BELOW for name in self.names) - self.k
        if n_summed > 1:
            blocks.append(note(f"The {n_summed:,} values closest to 0 are one bar, their sum; to_dataframe() has all."))
        return blocks

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per value: `name`, `value`, in the order in which they were given."""
        table: pandas.DataFrame = import_package("pandas").DataFrame(
            {"name": self.names, "value": self.values.tolist()}
        )
        return table

    def to_matplotlib(self) -> "Figure":
        """The bars, the first on top.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        names, values = zip(*self.shown, strict=True)
        figure: Figure = make_figure(7, 1.2 + 0.26 * len(names))
        axes = figure.add_subplot()
        places = range(len(names))
        axes.barh(places, values, color=[_HUES[value >= 0] for value in values])
        axes.set_yticks(places, [for_matplotlib(readable(name, _MOST_LABEL)) for name in names])
        axes.invert_yaxis()
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_title(for_matplotlib(self.title))
        return figure

    def to_plotly(self) -> Any:
        """The bars as a `plotly.graph_objects.Figure`.

        Raises:
            MissingDependencyError: plotly is not installed.
        """
        graph = import_package("plotly.graph_objects")
        names, values = zip(*self.shown, strict=True)
        colours = [_HUES[value >= 0] for value in values]
        bar = graph.Bar(x=list(values), y=list(range(len(names))), orientation="h", marker={"color": colours})
        figure = graph.Figure([bar])
        figure.update_yaxes(
            tickvals=list(range(len(names))),
            ticktext=[for_plotly(readable(name)) for name in names],
            autorange="reversed",
        )
        figure.update_layout(title=for_plotly(self.title))
        return figure


def _place(value: float, ends: tuple[float, float]) -> float:
    """Where a value is between the ends, from 0 to 1."""
    low, high = ends
    return (value - low) / (high - low) if high > low else 0.0


def _bar(value: float, ends: tuple[float, float]) -> Element:
    """A bar from 0 to the value; nothing where that is not finite."""
    to = value if math.isfinite(value) else 0.0
    start, end = sorted((_place(0.0, ends), _place(to, ends)))
    style = f"left:{100 * start:.4g}%;width:{100 * (end - start):.4g}%"
    return element("i", class_="hl-below" if value < 0 else None, style=style)


@reads()
def bars(
    names: "Sequence[str] | Mapping[str, float] | pandas.DataFrame",
    values: Tensor | Sequence[float] | None = None,
    *,
    k: int = 20,
    row: int | None = None,
    title: str = "values",
) -> Bars:
    """Values with names as bars: the `k` furthest from 0, and the sum of the others.

        hl.viz.bars(analysis.attribution.attribute_to_heads(model, cache, " Mary", " John"), title="logit difference")

    Args:
        names: what each value belongs to; or names with values, as a mapping or as a table with a column `value` and
            a column `component` (else its first column names the values).
        values: one for each name.
        k: how many bars to draw. A `remainder` and a `bias` in attribution's tables have bars of their own below.
        row: of the batch, where a table has several (a column `row`); None: the mean over rows.
        title: what the values are.

    Raises:
        InputError: names without values or the other way round, a table that lacks a column or the row, or `k` below 1.
    """
    read_int(k, what="bars: k", least=1)
    holds_both = hasattr(names, "columns") or isinstance(names, Mapping)
    if holds_both and values is not None:
        raise InputError("bars: values are given beside a table or a mapping, which has its own")
    if not holds_both and values is None:
        raise InputError("bars: names have no values; give them too, or a mapping or a table that holds both")
    given: Sequence[object]
    numbers: Tensor | Sequence[float] | None
    if hasattr(names, "columns"):
        given, numbers, n_averaged = _read_table(names, row)
        title = title if n_averaged == 1 else f"{title} (mean over {n_averaged} rows)"
    elif row is not None:
        raise InputError("bars: row goes with a table")
    elif isinstance(names, Mapping):
        given, numbers = list(names), [float(number) for number in names.values()]
    else:
        given, numbers = list(names), values
    read = torch.as_tensor(numbers).detach().float().cpu()
    if read.ndim != 1 or not read.numel():
        raise InputError(f"bars: values have the shape {list(read.shape)}; expected one axis, not empty")
    labels = read_labels(given, len(read), subject="bars", what="values")
    return Bars(names=labels, values=read, k=k, heading=title)


def _read_table(table: Any, row: int | None) -> tuple[list[str], list[float], int]:
    columns = list(map(str, table.columns))
    if "value" not in columns or len(columns) < 2:
        raise InputError(f"bars: the table has the columns {columns}; expected 'value' and one with names")
    if "row" in columns and row is not None:
        rows = sorted(set(table["row"].tolist()))
        table = table[table["row"] == row]
        if not len(table):
            raise InputError(f"bars: the table has no row {row}; it has {rows}")
    elif row is not None:
        raise InputError(f"bars: row is {row}, and the table has no column 'row', but {columns}")
    name = "component" if "component" in columns else next(column for column in columns if column != "value")
    n_averaged = table["row"].nunique() if "row" in columns else 1
    means = table.groupby(name, sort=False)["value"].mean() if n_averaged > 1 else table.set_index(name)["value"]
    return [str(label) for label in means.index], means.tolist(), n_averaged
