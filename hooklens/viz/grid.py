"""Values on a grid: layers by positions, layers by heads, queries by keys; several panels side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.display.blocks import note
from hooklens.display.colours import diverging, sequential
from hooklens.display.elements import Child, Element, element
from hooklens.display.labels import visible
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.display.view import View
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.viz.charts import draw_heatmaps

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

Scale = Literal["signed", "amount"]

MOST_CELLS = 4000
_MOST_UPRIGHT = 4
_MOST_LABEL = 18


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Grid(View):
    """Values on a grid, one panel beside the other on one scale.

    Attributes:
        values: `[panel row column]`; NaN is a cell without a value, and is hatched.
        rows: the name of the rows' axis, and what is written at each row.
        columns: the same of columns.
        panels: what is written above each panel; one panel may have an empty text.
        heading: what the values are.
        texts: what is written in the cells, by panel, row and column; None writes nothing.
        scale: `"signed"`: blue above 0 and orange below, as far to both sides; `"amount"`: from 0 to the largest.
    """

    values: Float[Tensor, "panel row column"]
    rows: tuple[str, tuple[str, ...]]
    columns: tuple[str, tuple[str, ...]]
    panels: tuple[str, ...]
    heading: str
    texts: tuple[tuple[tuple[str, ...], ...], ...] | None = None
    scale: Scale = "signed"

    kind: ClassVar[str] = "grid"
    style: ClassVar[str] = read_asset(Path(__file__).with_name("grid.css"))
    script: ClassVar[str] = read_asset(Path(__file__).with_name("grid.js"))

    @property
    def title(self) -> str:
        """What the values are."""
        return self.heading

    @property
    def largest(self) -> float:
        """The value at the end of the scale."""
        finite = self.values[self.values.isfinite()]
        return float(finite.abs().max()) if finite.numel() else 0.0

    @property
    def description(self) -> list[str]:
        """The sizes, and the cells furthest from 0."""
        n_panels, n_rows, n_columns = self.values.shape
        sizes = f"{n_rows} {self.rows[0]} x {n_columns} {self.columns[0]}" + (
            f", {n_panels} panels" if n_panels > 1 else ""
        )
        flat = self.values.nan_to_num(0.0).flatten().abs()
        furthest = flat.topk(min(10, flat.numel())).indices.tolist()
        return [sizes, *(f"  {self._tell(*self._place(index))}" for index in furthest)]

    def _place(self, index: int) -> tuple[int, int, int]:
        _, n_rows, n_columns = self.values.shape
        panel, rest = divmod(index, n_rows * n_columns)
        return panel, *divmod(rest, n_columns)

    def _tell(self, panel: int, row: int, column: int) -> str:
        """A cell in words."""
        value = float(self.values[panel, row, column])
        where = [self.panels[panel], _name(self.rows, row), _name(self.columns, column)]
        told = ", ".join(part for part in where if part) + f": {format_number(value)}"
        return told if self.texts is None else f"{told} ({self.texts[panel][row][column]})"

    def _body(self) -> list[Child]:
        n_panels, n_rows, n_columns = self.values.shape
        shown = max(1, min(n_panels, MOST_CELLS // max(1, n_rows * n_columns)))
        if n_rows * n_columns > MOST_CELLS:
            return [
                element("h3", self.title),
                note(
                    f"{n_rows:,} x {n_columns:,} cells are more than the {MOST_CELLS:,} that are shown; "
                    "take a part of them, or .to_matplotlib()"
                ),
            ]
        blocks: list[Child] = [
            element("h3", self.title),
            element("div", (self._panel(panel) for panel in range(shown)), class_="hl-panels"),
            element(
                "div", "Point at a cell, or move with the arrow keys.", class_="hl-readout hl-faint", aria_live="polite"
            ),
            self._legend(),
        ]
        if shown < n_panels:
            blocks.append(note(f"{n_panels - shown} of {n_panels} panels are left out; to_dataframe() has all"))
        return blocks

    def _panel(self, panel: int) -> Element:
        upright = max((len(label) for label in self.columns[1]), default=0) > _MOST_UPRIGHT
        head = element(
            "tr",
            element("th", f"{self.rows[0]} \\ {self.columns[0]}", scope="col"),
            (element("th", element("span", visible(label, _MOST_LABEL)), scope="col") for label in self.columns[1]),
        )
        rows = (
            element(
                "tr",
                element("th", visible(label, _MOST_LABEL), scope="row"),
                (self._cell(panel, row, column) for column in range(len(self.columns[1]))),
            )
            for row, label in enumerate(self.rows[1])
        )
        caption = self.panels[panel]
        return element(
            "div",
            element(
                "table",
                element("caption", caption) if caption else None,
                element("thead", head),
                element("tbody", rows),
                class_="hl-grid hl-upright" if upright else "hl-grid",
                aria_label=caption or self.title,
            ),
            class_="hl-scroll",
        )

    def _cell(self, panel: int, row: int, column: int) -> Element:
        value = float(self.values[panel, row, column])
        colour = diverging(value, self.largest) if self.scale == "signed" else sequential(value, self.largest)
        text = "" if self.texts is None else self.texts[panel][row][column]
        told = self._tell(panel, row, column)
        return element("td", visible(text, _MOST_LABEL), style=colour, aria_label=told, tabindex=-1)

    def _legend(self) -> Element:
        largest = self.largest
        low = -largest if self.scale == "signed" else 0.0
        steps = [low + (largest - low) * step / 8 for step in range(9)]
        paint = diverging if self.scale == "signed" else sequential
        stops = ",".join(paint(step, largest).partition(";")[0].removeprefix("background:") for step in steps)
        bar = element("i", style=f"background:linear-gradient(90deg,{stops})")
        return element("div", format_number(low), bar, format_number(largest), class_="hl-scale", aria_hidden="true")

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per cell: the panel, where there are several, the labels of row and column, and the value."""
        records = []
        for index, value in enumerate(self.values.flatten().tolist()):
            panel, row, column = self._place(index)
            labels = [self.rows[1][row], self.columns[1][column]]
            records.append([self.panels[panel], *labels, value] if len(self.panels) > 1 else [*labels, value])
        names = [self.rows[0], self.columns[0], "value"]
        names = ["panel", *names] if len(self.panels) > 1 else names
        table: pandas.DataFrame = import_package("pandas").DataFrame(records, columns=names)
        if self.texts is not None:
            table["text"] = [text for panel in self.texts for row in panel for text in row]
        return table

    def to_matplotlib(self) -> "Figure":
        """The panels as heatmaps.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return self._draw("matplotlib")

    def to_plotly(self) -> "object":
        """The panels as heatmaps of plotly, a `plotly.graph_objects.Figure`.

        Raises:
            MissingDependencyError: plotly is not installed.
        """
        return self._draw("plotly")

    def _draw(self, backend: Literal["plotly", "matplotlib"]) -> "Figure":
        figure: Figure = draw_heatmaps(
            self.values.detach().double().cpu(),
            (self.rows[0], [visible(label) for label in self.rows[1]]),
            (self.columns[0], [visible(label) for label in self.columns[1]]),
            list(self.panels),
            backend=backend,
            title=self.title,
        )
        return figure


def _name(axis: tuple[str, tuple[str, ...]], place: int) -> str:
    name, labels = axis
    label = visible(labels[place])
    return f"{name} {label}" if label == str(place) or not name else f"{name} {place} {label}"


def grid(
    values: Float[Tensor, "*panel row column"],
    *,
    rows: tuple[str, Sequence[object]] | str = "row",
    columns: tuple[str, Sequence[object]] | str = "column",
    panels: Sequence[str] | None = None,
    title: str = "",
    texts: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]] | None = None,
    scale: Scale = "signed",
) -> Grid:
    """Values on a grid, such as the results of patches by layer and position.

    Args:
        values: `[row column]`, or `[panel row column]` for several grids on one scale. NaN is a cell without a value.
        rows: the axis' name, and what stands at each row; only a name numbers the rows.
        columns: the same of columns.
        panels: what stands above each panel.
        title: what the values are.
        texts: what is written in the cells, in the shape of `values`.
        scale: `"signed"`: blue above 0 and orange below, as far to both sides; `"amount"`: from 0 to the largest.

    Raises:
        InputError: values of another shape, or labels, panels or texts that do not go with it.
    """
    if values.ndim not in (2, 3) or values.numel() == 0:
        raise InputError(
            f"grid: values have the shape {list(values.shape)}; expected [row column] or [panel row column], none of "
            "them empty"
        )
    if scale not in ("signed", "amount"):
        raise InputError(f"grid: scale is {scale!r}; expected 'signed' or 'amount'")
    cube = values.detach().float().cpu().reshape(-1, *values.shape[-2:])
    if panels is None:
        panels = [""] if len(cube) == 1 else [str(number) for number in range(len(cube))]
    if len(panels) != len(cube):
        raise InputError(f"grid: {len(panels)} panels are named, and the values have {len(cube)}")
    return Grid(
        values=cube,
        rows=_read_axis(rows, cube.shape[1], "rows"),
        columns=_read_axis(columns, cube.shape[2], "columns"),
        panels=tuple(panels),
        heading=title or "values",
        texts=None if texts is None else _read_texts([texts] if values.ndim == 2 else texts, cube.shape),
        scale=scale,
    )


def _read_axis(given: tuple[str, Sequence[object]] | str, size: int, what: str) -> tuple[str, tuple[str, ...]]:
    if isinstance(given, str):
        return given, tuple(map(str, range(size)))
    name, labels = given
    if len(labels) != size:
        raise InputError(f"grid: {len(labels)} labels are given for {what}, and the values have {size}")
    return name, tuple(map(str, labels))


def _read_texts(given: Sequence[object], shape: Sequence[int]) -> tuple[tuple[tuple[str, ...], ...], ...]:
    read = tuple(tuple(tuple(str(cell) for cell in row) for row in panel) for panel in given)  # type: ignore[attr-defined]
    sizes = (
        len(read),
        *({len(panel) for panel in read} or {0}),
        *({len(row) for panel in read for row in panel} or {0}),
    )
    if sizes != tuple(shape) or math.prod(sizes) == 0:
        raise InputError(f"grid: texts have the sizes {list(sizes)}, and the values have {list(shape)}")
    return read
