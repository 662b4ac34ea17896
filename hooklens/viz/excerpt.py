"""What a summary shows of many values: the strongest of them, and a grid as small as there is room for.

A small grid is a view, a larger one colours alone, a huge one is not drawn.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hooklens.display import Child, Picture, diverging, element, format_number, heading, note, sequential, visible
from hooklens.viz.grid import grid
from hooklens.viz.scale import Scale

MOST_CELLS = 400
"""The most cells of a grid that says in words what each cell holds."""

MOST_COLOURS = 1200
"""The most cells of a grid of colours."""

_MOST_LABEL = 18


def strongest(values: Float[Tensor, "*axes"], most: int, *, base: float = 0.0) -> list[int]:
    """The places, in the flattened values, of those that are furthest from a number; of equal ones the first first.

    Args:
        values: NaN counts as no distance.
        most: how many places.
        base: the number.
    """
    if values.is_meta:
        return []
    distances = (values.detach().flatten() - base).abs().nan_to_num(-1.0)
    places: list[int] = distances.argsort(descending=True, stable=True)[:most].tolist()
    return places


def thumbnail(
    values: Tensor,
    *,
    rows: tuple[str, Sequence[object]],
    columns: tuple[str, Sequence[object]],
    panels: Sequence[str] = ("",),
    title: str,
    scale: Scale = "signed",
    more: str = "plot() draws all",
) -> Picture:
    """A picture of values, as small as a summary needs it.

    Args:
        values: `[panel row column]`; NaN is a cell without a value.
        rows, columns, panels, title, scale: as for `grid`.
        more: where larger values are drawn.
    """
    n_cells = values.numel()
    if n_cells == 0 or values.is_meta:
        return note("there are no values to draw")
    if n_cells <= MOST_CELLS:
        return grid(values, rows=rows, columns=columns, panels=panels, title=title, scale=scale)
    if n_cells > MOST_COLOURS:
        return note(f"{n_cells:,} cells are too many to draw here; {more}")
    return [heading(title), *_colours(values.detach().double().cpu(), rows, columns, panels, scale)]


def _colours(
    values: Tensor,
    rows: tuple[str, Sequence[object]],
    columns: tuple[str, Sequence[object]],
    panels: Sequence[str],
    scale: Scale,
) -> list[Child]:
    finite = values[values.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    paint = diverging if scale == "signed" else sequential
    head = element(
        "tr",
        element("th", f"{rows[0]} \\ {columns[0]}", scope="col"),
        (element("th", visible(str(label), _MOST_LABEL), scope="col") for label in columns[1]),
    )
    blocks: list[Child] = []
    for panel, name in zip(values.tolist(), panels, strict=True):
        body = (
            element(
                "tr",
                element("th", visible(str(label), _MOST_LABEL), scope="row"),
                (element("td", style=paint(value, largest), title=format_number(value)) for value in line),
            )
            for label, line in zip(rows[1], panel, strict=True)
        )
        made = element("table", element("caption", name) if name else None, element("thead", head), body)
        made.set("class", "hl-small")
        blocks.append(element("div", made, class_="hl-scroll"))
    blocks.append(note(f"colours from {format_number(-largest if scale == 'signed' else 0.0)} to {largest:.3g}"))
    return blocks
