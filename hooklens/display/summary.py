"""Summaries: what an object is, said once, for its plain text and for its display in a notebook.

A class says what there is to see (`Displayed._summary`); the layout of both forms is decided here. A text has at most
twenty lines of at most 120 columns; a page has at most a hundred kilobytes. Both say what they leave out.
"""

import textwrap
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeAlias

from hooklens.display.blocks import Cell, facts, fold, heading, note, table, write_cell
from hooklens.display.elements import Child, Element, render
from hooklens.display.numbers import format_bytes, format_count
from hooklens.display.page import fragment
from hooklens.display.text import MOST_COLUMNS, MOST_LINES, clip, columns, flatten
from hooklens.display.view import View

Picture: TypeAlias = "Child | View"
"""A part of a page."""

Page: TypeAlias = "Callable[[], Child | View]"
"""What makes a part of a page."""

MOST_BYTES = 100_000
"""The most bytes of a display's HTML."""

_MOST_FACTS = 40
_MOST_LETTERS = 400
_MOST_OPEN, _SHOWN = 15, 10
"""A table of more rows than the first number is folded, but for so many as the second."""

_KEPT = 1000
"""Bytes kept free for the notes of what is left out."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Listing:
    """A table of a summary.

    Attributes:
        columns: their names.
        rows: their cells; it is enough to give the first ones, and with `n_rows` to say how many there are.
        what: what a row is, in the plural.
        caption: what the table shows.
        n_rows: how many rows there are; None: those given.
        more: where the rows left out are to be found.
        styles: by row and column, the style of a cell of a page.
        on_pages: pages have the table, too; False: they show the same in another form.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    what: str = "rows"
    caption: str = ""
    n_rows: int | None = None
    more: str = "to_dataframe() has all"
    styles: Mapping[tuple[int, int], str] = field(default_factory=dict)
    on_pages: bool = True

    @property
    def size(self) -> int:
        """How many rows there are, those included that are not given."""
        return max(len(self.rows), self.n_rows or 0)

    def lines(self, most: int) -> list[str]:
        """The table as lines of text, the names of the columns first, and a line for what is left out."""
        if not self.rows or most < 2:
            return [f"  {self.size:,} {self.what}"] if self.size else []
        n_shown = len(self.rows) if self.size == len(self.rows) and self.size < most else min(len(self.rows), most - 2)
        shown = [[_plain(cell) for cell in row] for row in self.rows[:n_shown]]
        numeric = [
            place
            for place in range(len(self.columns))
            if all(_is_number(row[place]) or row[place] is None for row in self.rows[:n_shown])
        ]
        lines = columns([list(self.columns), *shown], right=numeric)
        return lines if n_shown == self.size else [*lines, _count(self.size - n_shown, self.what, self.more)]

    def block(self, most: int) -> list[Element]:
        """The table as elements."""
        cut = [[_cut(cell) for cell in row] for row in self.rows[:most]]
        made = table(self.columns, cut, caption=self.caption or self.what, most=most, styles=self.styles)
        left_out = self.size - len(cut)
        return made if not left_out else [*made, note(_count(left_out, self.what, self.more).strip())]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Summary:
    """What there is to see of an object.

    Attributes:
        title: what it is, in one line.
        facts: what is to be said of it, by name; None is left out.
        listing: a table; None: there is none.
        notes: remarks, at the end.
        pages: what only pages have, each made when a page is: elements, or a view.
    """

    title: str
    facts: Mapping[str, str | None] = field(default_factory=dict)
    listing: Listing | None = None
    notes: Sequence[str] = ()
    pages: Sequence[Page] = ()

    def __str__(self) -> str:
        """The plain form, of at most twenty lines."""
        named = self._facts()
        # A title, and what is needed to say what is left out, always have their lines.
        most = MOST_LINES - 1 - min(2, len(self.notes))
        # Cells of one column would be as wide as the widest; facts stand each in a line of its own.
        width = max(map(len, named), default=0)
        lines = [line for name, fact in named.items() for line in _wrap(name.ljust(width), fact)]
        room = most if self.listing is None or not self.listing.size else most - min(6, self.listing.size + 1)
        if len(lines) > room:
            lines = [*lines[: room - 1], _count(len(lines) - room + 1, "facts", "")]
        if self.listing is not None:
            lines += self.listing.lines(most - len(lines))
        lines += [f"  {flatten(one)}" for one in self.notes[:2]]
        return "\n".join(clip(line, MOST_COLUMNS) for line in [flatten(self.title), *lines])

    def to_html(self) -> str:
        """The form for notebooks, of at most a hundred kilobytes."""
        named = {name: _shorten(fact) for name, fact in self._facts().items()}
        shown = dict(islice(named.items(), _MOST_FACTS))
        blocks: list[Child] = [heading(_shorten(self.title))]
        blocks += [facts(shown)] if shown else []
        if len(named) > len(shown):
            blocks.append(note(f"{len(named) - len(shown)} more facts are left out"))
        notes = [note(_shorten(one)) for one in self.notes[:5]]
        room = MOST_BYTES - _KEPT - len(fragment(blocks, notes, label=self.title).encode())
        if self.listing is not None and self.listing.size and self.listing.on_pages:
            made, room = _fit_listing(self.listing, room)
            blocks += made
        views, n_left_out, left_out = "", 0, 0
        for make in self.pages:
            made_part = make()
            # A generator would be empty after its size was taken.
            block = made_part if isinstance(made_part, View) else list(_elements(made_part))
            written = block._repr_html_() if isinstance(block, View) else "".join(map(render, block))
            size = len(written.encode())
            if size > room:
                n_left_out, left_out = n_left_out + 1, left_out + size
                continue
            room -= size
            if isinstance(block, View):
                views += written
            else:
                blocks.append(block)
        if n_left_out:
            blocks.append(note(f"{format_count(n_left_out)} parts of {format_bytes(left_out)} are left out here"))
        return fragment(blocks, notes, label=_shorten(self.title)) + views

    def blocks(self, most: int = 20) -> list[Child]:
        """Title, facts and the first rows of the table, as a part of another page."""
        named = {name: _shorten(fact) for name, fact in self._facts().items()}
        listed = [] if self.listing is None or not self.listing.size else self.listing.block(most)
        return [heading(_shorten(self.title)), facts(dict(islice(named.items(), _MOST_FACTS))), listed]

    def _facts(self) -> dict[str, str]:
        return {name: fact for name, fact in self.facts.items() if fact is not None}


class Displayed:
    """Base of what shows itself: a subclass says in `_summary` what there is to see.

    A dataclass keeps the printed form of this class, or that of a class between the two.
    """

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        # `@dataclass` writes a form of its own, with all entries of tensors, unless the class itself has one.
        if "__repr__" not in cls.__dict__:
            setattr(cls, "__repr__", cls.__repr__)  # noqa: B010  # a plain assignment to a method is no type error less

    @abstractmethod
    def _summary(self) -> Summary:
        """What there is to see. It costs little, runs no model and moves no tensor of size."""

    def __repr__(self) -> str:
        return str(self._summary())

    def _repr_html_(self) -> str:
        return self._summary().to_html()


def _wrap(name: str, fact: str) -> list[str]:
    """A fact in at most three lines."""
    first = f"  {name}  "
    return textwrap.wrap(
        flatten(fact),
        MOST_COLUMNS,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        max_lines=3,
        placeholder=" \N{HORIZONTAL ELLIPSIS}",
    ) or [first.rstrip()]


def _fit_listing(listing: Listing, room: int) -> tuple[list[Child], int]:
    """A table of as many rows as there is room for: the first ones to be seen, a longer one folded below them."""
    most = 100
    while True:
        made = listing.block(most)
        size = len("".join(map(render, made)).encode())
        if size <= room // 2 or most < 2:
            break
        most //= 2
    if size > room // 2:
        return [note(f"{listing.size:,} {listing.what} are left out; {listing.more}")], room
    if listing.size <= _MOST_OPEN:
        return list(made), room - size
    first = replace(listing, rows=listing.rows[:_SHOWN], n_rows=None).block(_SHOWN)
    n_folded = min(most, len(listing.rows))
    told = f"all {listing.size:,}" if n_folded == listing.size else f"{n_folded:,} of {listing.size:,}"
    blocks: list[Child] = [*first, fold(f"{told} {listing.what}", made)]
    return blocks, room - 2 * size


def _elements(block: Child) -> Iterable[Element]:
    if isinstance(block, Element):
        yield block
    elif block is not None and not isinstance(block, str):
        for one in block:
            yield from _elements(one)


def _count(n: int, what: str, more: str) -> str:
    return f"  ... {n:,} more {what}" + (f"; {more}" if more else "")


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _plain(cell: Cell) -> str:
    """A cell as text."""
    if isinstance(cell, Element):
        return flatten("".join(cell.itertext()))
    return flatten(write_cell(cell))


def _cut(cell: Cell) -> Cell:
    return _shorten(cell, 120) if isinstance(cell, str) else cell


def _shorten(text: str, most: int = _MOST_LETTERS) -> str:
    return clip(text, most)
