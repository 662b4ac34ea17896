"""Sites: where a sweep patches, as a grid of cells.

A cell is one experiment: replace the activation at one hook point (in one layer, or at the one such point of the
model), at one position or all, in one head or all, and for attention patterns from one source position or all,
and see what the metric does. A grid is the product of the axes it spans:

    grid("resid_pre")                                  # layer x position
    grid("z")                                          # layer x head, all positions at once
    grid("z", positions="each")                        # layer x position x head
    grid("pattern", positions="each", sources="each")  # layer x query position x head x key position
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from hooklens.axes import HookSite, find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.names import select_names
from hooklens.patching.errors import SiteError

Span = Literal["each", "all"] | int | Sequence[int]
"""`"each"`: a cell for each; `"all"`: all at once in every cell; numbers: a cell for each of these."""

AxisName = Literal["layer", "pos", "head", "source"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One patch.

    Attributes:
        name: the full hook name.
        layer: the layer in it, if it has one.
        pos: the position patched (the query position of a pattern), not negative unless prompts differ in
            length; None: all.
        head: the head patched, a key-value head where the tensor has those; None: all.
        source: the key position patched in a pattern; None: all.
    """

    name: str
    layer: int | None = None
    pos: int | None = None
    head: int | None = None
    source: int | None = None

    def describe(self) -> dict[str, Any]:
        """The cell as a row of a table."""
        return {"site": self.name, "layer": self.layer, "pos": self.pos, "head": self.head, "source": self.source}

    def __str__(self) -> str:
        parts = [f"{word} {value}" for word in ("pos", "head", "source") if (value := getattr(self, word)) is not None]
        return ", ".join([self.name, *parts])


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The cells of one kind of hook point; see `grid`."""

    site: str
    layers: Span
    positions: Span | None
    heads: Span
    sources: Span


def grid(
    site: str,
    *,
    layers: Span = "each",
    positions: Span | None = None,
    heads: Span = "each",
    sources: Span = "all",
) -> Grid:
    """A grid of cells.

    Args:
        site: the kind of hook point: a word (`"resid_pre"`, `"z"`, `"pattern"`), or a name or glob.
        layers: layers patched; negative ones count from the last.
        positions: positions patched, those of the queries for scores and patterns; negative ones count from each
            prompt's end. None: each where the tensor has no heads, all at once where it has.
        heads: heads patched, where the tensor has them: query heads, or key-value heads for keys and values.
        sources: key positions patched, for scores and patterns.

    Example:
        >>> patching.grid("z", layers=range(6, 12), positions=-1)
    """
    return Grid(site=site, layers=layers, positions=positions, heads=heads, sources=sources)


Sites = str | Grid | Sequence[str | Grid]


@dataclass(frozen=True)
class CellArray:
    """The cells of a sweep in order, and the axes they are laid out on.

    Attributes:
        cells: all cells; the last axis moves fastest.
        axes: the axes spanned, each with its labels. Several grids stand one after another on an axis `"cell"`.
    """

    cells: tuple[Cell, ...]
    axes: dict[str, tuple[int | str, ...]]


def lay_out(sites: Sites, model: HookedCausalLM, lengths: Sequence[int]) -> CellArray:
    """The cells that sites describe, checked against the model and the prompts.

    Raises:
        HookNameError: a site that the model does not have.
        SiteError: layers, positions, heads or sources outside, or axes that the site does not have; all offenders
            of a grid are named.
    """
    listed = [sites] if isinstance(sites, str | Grid) else list(sites)
    grids = [grid(site) if isinstance(site, str) else site for site in listed]
    wrong = [type(one).__name__ for one in grids if not isinstance(one, Grid)]
    if wrong or not grids:
        raise SiteError(f"sites are hook names, patching.grid(...), or a list of these; got {wrong or 'an empty list'}")
    arrays = [_lay_out_grid(one, model, lengths) for one in grids]
    if len(arrays) == 1:
        return arrays[0]
    cells = tuple(cell for array in arrays for cell in array.cells)
    return CellArray(cells, {"cell": tuple(str(cell) for cell in cells)})


def _lay_out_grid(one: Grid, model: HookedCausalLM, lengths: Sequence[int]) -> CellArray:
    names = _names_by_layer(one, model)
    kinds = {find_site(name) for name in names.values()}
    assert None not in kinds
    if len(kinds) > 1:
        raise SiteError(f"site {one.site!r} selects different kinds of hook points, {sorted(names.values())}; name one")
    [kind] = kinds
    assert kind is not None
    spans = _Spans(one, kind, model, lengths)
    axes: dict[str, tuple[int | str, ...]] = {}
    choices: list[Sequence[int | None]] = []
    for axis, chosen in (("layer", list(names)), *spans.choices()):
        choices.append(chosen)
        if chosen != [None]:
            axes[axis] = tuple(label for label in chosen if label is not None)
    cells = tuple(
        Cell(name=names[layer], layer=layer, pos=pos, head=head, source=source)
        for layer, pos, head, source in product(*choices)
    )
    return CellArray(cells, axes)


def _names_by_layer(one: Grid, model: HookedCausalLM) -> dict[int | None, str]:
    """The hook point in each layer of a grid; the key is None for a point outside the blocks."""
    points = model.hook_points()
    found: dict[int | None, str] = {}
    for name in select_names(one.site, points, n_layers=model.cfg.n_layers):
        layer = points[name].layer() if name.startswith("blocks.") else None
        if layer in found:
            raise SiteError(f"site {one.site!r} selects {found[layer]!r} and {name!r}; name one kind of hook point")
        found[layer] = name
    if one.layers == "each" or None in found:
        return found
    if one.layers == "all":
        raise SiteError(f"site {one.site!r}: layers cannot be patched all at once; give 'each' or numbers")
    layers = _resolve(one.layers, model.cfg.n_layers, f"site {one.site!r}: layers")
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise SiteError(f"site {one.site!r} selects no hook point in layers {missing}")
    return {layer: found[layer] for layer in layers}


class _Spans:
    """What a grid spans inside one tensor."""

    def __init__(self, one: Grid, kind: HookSite, model: HookedCausalLM, lengths: Sequence[int]) -> None:
        self.grid, self.kind, self.lengths = one, kind, lengths
        self.heads_axis = next((axis for axis in ("head", "kv_head") if axis in kind.axes), None)
        self.n_heads = None if self.heads_axis is None else model.cfg.size(self.heads_axis)
        self.subject = f"site {one.site!r}"

    def choices(self) -> Iterator[tuple[AxisName, list[int | None]]]:
        """The axes after the layer, each with what its cells patch; `[None]` is all at once."""
        positions = self.grid.positions
        if positions is None:
            positions = "each" if self.heads_axis is None else "all"
        yield "pos", self._positions(positions, "positions")
        heads = self.grid.heads
        if self.n_heads is None:
            if heads not in ("each", "all"):
                raise SiteError(f"{self.subject}: heads={heads!r}, but its axes are {list(self.kind.axes)}")
            yield "head", [None]
        else:
            yield "head", self._indices(heads, self.n_heads, f"{self.subject}: heads")
        if "key" not in self.kind.axes and self.grid.sources != "all":
            raise SiteError(
                f"{self.subject}: sources={self.grid.sources!r}, but only attention scores and patterns have key "
                "positions"
            )
        yield "source", self._positions(self.grid.sources, "sources")

    def _indices(self, span: Span, size: int, subject: str) -> list[int | None]:
        if span == "all":
            return [None]
        return [*range(size)] if span == "each" else [*_resolve(span, size, subject)]

    def _positions(self, span: Span, noun: str) -> list[int | None]:
        subject = f"{self.subject}: {noun}"
        shortest = min(self.lengths)
        if len(set(self.lengths)) == 1 or span == "all":
            return self._indices(span, shortest, subject)
        if span == "each":
            raise SiteError(
                f"{subject}='each' needs prompts of one length, found {sorted(set(self.lengths))}; give the "
                "positions, negative ones count from each prompt's end"
            )
        # Where prompts differ in length a negative position is another one in each, so it stays as it is, and may
        # be the same as a positive one in some.
        chosen: list[int | str] = [span] if isinstance(span, int | str) else [int(index) for index in span]
        for pos in dict.fromkeys(chosen):
            _resolve(pos, shortest, subject)
        return [int(pos) for pos in dict.fromkeys(chosen)]


def _resolve(span: int | Sequence[int] | str, size: int, subject: str) -> list[int]:
    """Indices counted from 0.

    Raises:
        SiteError: no numbers, twice the same, or outside.
    """
    if isinstance(span, str):
        raise SiteError(f"{subject} is {span!r}; expected 'each', 'all', a number or a list of them")
    indices = [span] if isinstance(span, int) else [int(index) for index in span]
    outside = [index for index in indices if not -size <= index < size]
    if outside or not indices:
        found = f"{outside} out of range" if outside else "an empty list"
        raise SiteError(f"{subject}: {found}; there are {size}, 0 to {size - 1} (negative ones count from the end)")
    resolved = [index % size for index in indices]
    if len(set(resolved)) < len(resolved):
        raise SiteError(f"{subject}: {indices} names some twice")
    return resolved
