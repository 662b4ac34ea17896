"""Values on a grid: layers by positions, layers by heads, queries by keys; several panels side by side."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import reads
from hooklens.display.blocks import note
from hooklens.display.elements import Child, Element, element
from hooklens.display.labels import visible
from hooklens.display.numbers import format_number
from hooklens.display.page import read_asset
from hooklens.display.view import View
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.viz.charts import draw_heatmaps
from hooklens.viz.labels import for_matplotlib, for_plotly, read_labels
from hooklens.viz.scale import Scale, check_scale, furthest, paint, read_script, readout, scale_bar

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Texts = tuple[tuple[tuple[str, ...], ...], ...]
"""A text for each cell, by panel, row and column."""

MOST_CELLS = 4000
_MOST_UPRIGHT = 4
_MOST_LABEL = 18
# Axes whose labels are tokens, which repeat: what is told of a cell has the place, too.
_POSITIONS = ("pos", "query", "key")


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
        details: what is told of the cell that is pointed at, beside its value; None tells its text.
        scale: `"signed"`: blue above 0 and orange below, as far to both sides; `"amount"`: from 0 to the largest.
    """

    values: Float[Tensor, "panel row column"]
    rows: tuple[str, tuple[str, ...]]
    columns: tuple[str, tuple[str, ...]]
    panels: tuple[str, ...]
    heading: str
    texts: Texts | None = None
    details: Texts | None = None
    scale: Scale = "signed"

    kind: ClassVar[str] = "grid"
    style: ClassVar[str] = read_asset(Path(__file__).with_name("grid.css"))
    script: ClassVar[str] = read_script(Path(__file__).with_name("grid.js"))

    @cached_property
    def largest(self) -> float:
        """The value at the end of the scale."""
        return furthest(self.values.flatten().tolist())

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
        if self.details is not None:
            text = self.details[panel][row][column]
        else:
            text = "" if self.texts is None else visible(self.texts[panel][row][column])
        return f"{told} ({text})" if text else told

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
            readout("Point at a cell, or move with the arrow keys."),
            scale_bar(self.largest, self.scale),
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
        text = "" if self.texts is None else self.texts[panel][row][column]
        told = self._tell(panel, row, column)
        return element(
            "td", visible(text, _MOST_LABEL), style=paint(value, self.largest, self.scale), aria_label=told, tabindex=-1
        )

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
        figure = self._draw("matplotlib")
        panels = figure.axes[: len(self.panels)]
        if self.scale == "amount":
            for axes in panels:
                axes.images[0].set(cmap="Blues", clim=(0.0, self.largest or 1.0))
        self._write_texts(figure, panels)
        return figure

    def to_plotly(self) -> Any:
        """The panels as heatmaps of plotly, a `plotly.graph_objects.Figure`.

        Raises:
            MissingDependencyError: plotly is not installed.
        """
        figure: Any = self._draw("plotly")
        if self.scale == "amount":
            figure.update_layout(coloraxis={"colorscale": "Blues", "cmin": 0.0, "cmid": None})
        return figure

    def _draw(self, backend: Literal["plotly", "matplotlib"]) -> "Figure":
        write = for_matplotlib if backend == "matplotlib" else for_plotly
        figure: Figure = draw_heatmaps(
            self.values.detach().double().cpu(),
            (self.rows[0], [write(visible(label)) for label in self.rows[1]]),
            (self.columns[0], [write(visible(label)) for label in self.columns[1]]),
            [write(panel) for panel in self.panels],
            backend=backend,
            title=write(self.title),
        )
        return figure

    def _write_texts(self, figure: "Figure", panels: "Sequence[Axes]") -> None:
        """Write the texts into the cells, which are made large enough."""
        if self.texts is None:
            return
        n_panels, n_rows, n_columns = self.values.shape
        longest = min(_MOST_LABEL, max(len(text) for panel in self.texts for row in panel for text in row))
        figure.set_size_inches(n_panels * (1.8 + n_columns * max(0.35, 0.085 * longest)), max(4.0, 1.6 + 0.26 * n_rows))
        for axes, panel, values in zip(panels, self.texts, self.values.tolist(), strict=True):
            image = axes.images[0]
            for row, texts in enumerate(panel):
                for column, text in enumerate(texts):
                    red, green, blue, _ = image.cmap(image.norm(values[row][column]))
                    # The relative luminance, without the correction that does not matter for a choice of two.
                    is_dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
                    axes.text(
                        column,
                        row,
                        visible(text, _MOST_LABEL),
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="white" if is_dark else "black",
                        parse_math=False,
                    )


def _name(axis: tuple[str, tuple[str, ...]], place: int) -> str:
    name, labels = axis
    label = visible(labels[place])
    return f"{name} {place} {label}" if name in _POSITIONS and label != str(place) else f"{name} {label}".strip()


@reads()
def grid(
    values: Float[Tensor, "*panel row column"],
    *,
    rows: tuple[str, Sequence[object]] | str = "row",
    columns: tuple[str, Sequence[object]] | str = "column",
    panels: Sequence[str] | None = None,
    title: str = "",
    texts: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]] | None = None,
    details: Sequence[Sequence[str]] | Sequence[Sequence[Sequence[str]]] | None = None,
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
        details: what is told of the cell that is pointed at, beside its value, in the same shape; None tells its text.
        scale: `"signed"`: blue above 0 and orange below, as far to both sides; `"amount"`: from 0 to the largest.

    Raises:
        InputError: values of another shape, or labels, panels or texts that do not go with it.
    """
    if values.ndim not in (2, 3) or values.numel() == 0:
        raise InputError(
            f"grid: values have the shape {list(values.shape)}; expected [row column] or [panel row column], none of "
            "them empty"
        )
    check_scale(scale, "grid")
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
        texts=None if texts is None else _read_texts([texts] if values.ndim == 2 else texts, cube.shape, "texts"),
        details=None
        if details is None
        else _read_texts([details] if values.ndim == 2 else details, cube.shape, "details"),
        scale=scale,
    )


def _read_axis(given: tuple[str, Sequence[object]] | str, size: int, what: str) -> tuple[str, tuple[str, ...]]:
    if isinstance(given, str):
        return given, tuple(map(str, range(size)))
    name, labels = given
    return name, read_labels(labels, size, subject="grid", what=what)


def _read_texts(given: Sequence[object], shape: Sequence[int], what: str) -> Texts:
    read = tuple(tuple(tuple(str(cell) for cell in row) for row in panel) for panel in given)  # type: ignore[attr-defined]
    sizes = (
        len(read),
        *({len(panel) for panel in read} or {0}),
        *({len(row) for panel in read for row in panel} or {0}),
    )
    if sizes != tuple(shape) or math.prod(sizes) == 0:
        raise InputError(f"grid: {what} have the sizes {list(sizes)}, and the values have {list(shape)}")
    return read
