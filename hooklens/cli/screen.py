"""What commands print with: one console, tables, and heat maps that also work without colour."""

from collections.abc import Iterable, Sequence
from typing import Literal

from rich.box import ASCII, SIMPLE_HEAD
from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

# What is printed is laid out for this many columns; a wider terminal is not filled.
_LEAST_WIDTH, _MOST_WIDTH = 80, 100
_WIDTH_OF_FILES = 96


def make_console() -> Console:
    """A console on stdout, 80 to 100 columns wide, plain where stdout is no terminal."""
    terminal = Console()
    width = terminal.width if terminal.is_terminal else _WIDTH_OF_FILES
    return Console(width=min(max(width, _LEAST_WIDTH), _MOST_WIDTH), highlight=False)


def say(console: Console, text: str = "") -> None:
    """Print a paragraph, wrapped at words; brackets in it are text, not markup."""
    console.print(text, markup=False)


def say_heading(console: Console, text: str) -> None:
    """Print a heading with a blank line around it."""
    console.print()
    console.print(Text(text, style="bold"))
    console.print(Text(("-" if _is_ascii(console) else "─") * len(text), style="bold"))


def make_table(console: Console, columns: Sequence[str], *, numeric: Iterable[str] = ()) -> Table:
    """An empty table; the first column keeps its words whole, and the columns named in `numeric` are right-aligned."""
    table = Table(box=ASCII if _is_ascii(console) else SIMPLE_HEAD, pad_edge=False, show_edge=False)
    right = set(numeric)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, no_wrap=index == 0 or column in right)
    return table


def print_heat_map(
    console: Console,
    values: Sequence[Sequence[float]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    row_title: str,
) -> None:
    """Print numbers between 0 and 1 as a grid, shaded: 0 is plain, 1 is full.

    Where the output has colours a cell's background is its shade; elsewhere a bar of up to five characters stands
    beside the number. Values outside 0 to 1 keep their number and take the nearest shade.

    Args:
        console: where to print.
        values: rows of cells.
        row_labels: one per row.
        column_labels: one per cell of a row.
        row_title: what the rows are.
    """
    table = make_table(console, [row_title, *column_labels], numeric=column_labels)
    has_colours = console.color_system is not None
    for label, row in zip(row_labels, values, strict=True):
        cells = [_coloured_cell(value) if has_colours else _plain_cell(value, _is_ascii(console)) for value in row]
        table.add_row(Text(label), *cells)
    console.print(table)


def _coloured_cell(value: float) -> Text:
    # From white (0) to a dark blue (1): light and dark terminals both show the order.
    strength = min(max(value, 0.0), 1.0)
    red, green, blue = (round(255 + (dark - 255) * strength) for dark in (8, 48, 130))
    letters = "white" if strength > 0.5 else "black"
    return Text(_format_cell(value), style=Style(color=letters, bgcolor=f"rgb({red},{green},{blue})"))


def _plain_cell(value: float, ascii_only: bool) -> Text:  # noqa: FBT001
    filled = round(5 * min(max(value, 0.0), 1.0))
    return Text(("#" if ascii_only else "█") * filled + " " * (5 - filled) + _format_cell(value))


def _format_cell(value: float) -> str:
    # The sign of a number that rounds to zero says nothing.
    return f"{value:7.2f}".replace("-0.00", " 0.00")


def _is_ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")
