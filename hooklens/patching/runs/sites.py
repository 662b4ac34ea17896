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
from typing import Any, Literal, NamedTuple

from hooklens.arguments import reads, show
from hooklens.axes import EMBEDDINGS, HookSite, find_site, is_below_blocks
from hooklens.causal_lm import HookedCausalLM
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.hooks.names import select_names
from hooklens.patching.errors import SiteError

Span = Literal["each", "all"] | Choice
"""`"each"`: a cell for each; `"all"`: all at once in every cell; numbers (an int, a slice, or a list, range, array or
tensor of ints): a cell for each of these.
"""

AxisName = Literal["layer", "pos", "head", "source"]

_HINT = " (negative ones count from the end)"


class Place(NamedTuple):
    """Where a cell's patch stands in one prompt, counted from 0; None: all of an axis.

    Attributes:
        pos: the position, of a pattern the query's.
        head: the head, a key-value head where the tensor has those.
        source: the key position of a pattern.
    """

    pos: int | None
    head: int | None
    source: int | None


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

    def resolve(self, length: int) -> Place:
        """Where the patch stands in a prompt of so many tokens; what runs or sums a cell reads this.

        Raises:
            SiteError: a position that the prompt does not have.
        """
        pos, source = (
            None
            if one is None
            else resolve_choice(one, length, what=f"{self}: {noun}", noun="tokens", error=SiteError)[0]
            for one, noun in ((self.pos, "pos"), (self.source, "source"))
        )
        return Place(pos, self.head, source)

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


@reads()
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
        length: how many tokens every prompt must have, since positions were counted out; None: any that has them.
    """

    cells: tuple[Cell, ...]
    axes: dict[str, tuple[int | str, ...]]
    length: int | None = None

    @property
    def names(self) -> list[str]:
        """The hook points of the cells, each once."""
        return list(dict.fromkeys(cell.name for cell in self.cells))

    def check_lengths(self, lengths: Sequence[int], first: int) -> None:
        """Refuse prompts that come later and have other positions than those counted out.

        Args:
            lengths: tokens of each prompt.
            first: the number of the first one.

        Raises:
            SiteError: names them.
        """
        if self.length is None:
            return
        others = [f"{first + i} ({length})" for i, length in enumerate(lengths) if length != self.length]
        if others:
            raise SiteError(
                f"pairs {', '.join(others[:10])} have other numbers of tokens than the first, {self.length}, whose "
                "positions are patched one by one; give positions by number, negative ones count from each prompt's end"
            )


def lay_out(sites: Sites, model: HookedCausalLM, lengths: Sequence[int], *, more_follow: bool = False) -> CellArray:
    """The cells that sites describe, checked against the model and the prompts.

    Args:
        sites: what to patch.
        model: the model.
        lengths: tokens of each prompt.
        more_follow: other prompts come later, so positions given by number stay as they are.

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
    arrays = [_lay_out_grid(one, model, lengths, more_follow=more_follow) for one in grids]
    if len(arrays) == 1:
        return arrays[0]
    cells = tuple(cell for array in arrays for cell in array.cells)
    length = next((array.length for array in arrays if array.length is not None), None)
    return CellArray(cells, {"cell": tuple(str(cell) for cell in cells)}, length)


def _lay_out_grid(one: Grid, model: HookedCausalLM, lengths: Sequence[int], *, more_follow: bool) -> CellArray:
    names = _names_by_layer(one, model)
    kinds = {find_site(name) for name in names.values()}
    assert None not in kinds
    if len(kinds) > 1:
        raise SiteError(f"site {one.site!r} selects different kinds of hook points, {sorted(names.values())}; name one")
    [kind] = kinds
    assert kind is not None
    if "choice" in kind.axes and not kind.discrete:
        raise SiteError(
            f"site {one.site!r}: what stands at one place of the axis 'choice' belongs to other experts in another "
            "run, so a value put there from the other prompt would be another expert's; patch router.hook_weights or "
            "mlp_out"
        )
    spans = _Spans(one, kind, model, lengths, more_follow=more_follow)
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
    return CellArray(cells, axes, lengths[0] if spans.counted_out else None)


def _names_by_layer(one: Grid, model: HookedCausalLM) -> dict[int | None, str]:
    """The hook point in each layer of a grid; the key is None for a point outside the blocks."""
    points = model.hook_points()
    found: dict[int | None, str] = {}
    for name in select_names(one.site, points, n_layers=model.cfg.n_layers):
        layer = points[name].layer() if name.startswith("blocks.") else None
        if is_below_blocks(name) and name not in EMBEDDINGS:
            raise SiteError(
                f"site {name!r} stands before the stream begins, where no row can go on from; patch {EMBEDDINGS[0]!r}"
            )
        if layer in found:
            raise SiteError(f"site {one.site!r} selects {found[layer]!r} and {name!r}; name one kind of hook point")
        found[layer] = name
    if isinstance(one.layers, str) and one.layers == "all" and None not in found:
        raise SiteError(f"site {one.site!r}: layers cannot be patched all at once; give 'each' or numbers")
    if isinstance(one.layers, str) and one.layers == "each":
        return found
    layers = _resolve(one.layers, model.cfg.n_layers, f"site {one.site!r}: layers", noun="layers")
    if None in found:
        raise SiteError(f"site {one.site!r} stands in no layer, so layers={show(one.layers)} cannot be chosen")
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise SiteError(f"site {one.site!r} selects no hook point in layers {missing}")
    return {layer: found[layer] for layer in layers}


class _Spans:
    """What a grid spans inside one tensor."""

    def __init__(
        self, one: Grid, kind: HookSite, model: HookedCausalLM, lengths: Sequence[int], *, more_follow: bool
    ) -> None:
        self.grid, self.kind, self.lengths, self.more_follow = one, kind, lengths, more_follow
        self.counted_out = False
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
            if not _is_word(heads):
                raise SiteError(f"{self.subject}: heads={show(heads)}, but its axes are {list(self.kind.axes)}")
            yield "head", [None]
        else:
            yield "head", self._indices(heads, self.n_heads, f"{self.subject}: heads", noun="heads")
        sources = self.grid.sources
        if "key" not in self.kind.axes and not (_is_word(sources) and sources == "all"):
            raise SiteError(
                f"{self.subject}: sources={show(sources)}, but only attention scores and patterns have key positions"
            )
        yield "source", self._positions(sources, "sources")

    def _indices(self, span: Span, size: int, subject: str, noun: str) -> list[int | None]:
        if _is_word(span):
            return [None] if span == "all" else [*range(size)]
        return [*_resolve(span, size, subject, noun)]

    def _positions(self, span: Span, noun: str) -> list[int | None]:
        subject = f"{self.subject}: {noun}"
        shortest = min(self.lengths)
        needs_length = isinstance(span, slice) or (_is_word(span) and span == "each")
        is_uniform = len(set(self.lengths)) == 1
        if (_is_word(span) and span == "all") or (is_uniform and (needs_length or not self.more_follow)):
            self.counted_out = self.counted_out or needs_length
            return self._indices(span, shortest, subject, "tokens")
        if needs_length:
            raise SiteError(
                f"{subject}={show(span)} needs prompts of one length, found {sorted(set(self.lengths))}; give the "
                "positions, negative ones count from each prompt's end"
            )
        # Where prompts differ in length a negative position is another one in each, so it stays as it is, and may
        # be the same as a positive one in some.
        numbers = _read_span(span, subject)
        assert not isinstance(numbers, slice)
        outside = tuple(number for number in numbers if not -shortest <= number < shortest)
        resolve_choice(outside, shortest, what=subject, noun="tokens", hint=_HINT, error=SiteError)
        return [*numbers]


def _is_word(span: object) -> bool:
    """Whether a span is `"each"` or `"all"`; arrays would compare entry by entry."""
    return isinstance(span, str) and span in ("each", "all")


def _resolve(span: Span, size: int, subject: str, noun: str) -> list[int]:
    """Indices counted from 0.

    Raises:
        SiteError: no numbers, twice the same, or outside.
    """
    numbers = _read_span(span, subject)
    resolved = resolve_choice(numbers, size, what=subject, noun=noun, hint=_HINT, error=SiteError)
    if not resolved:
        raise SiteError(f"{subject}: {show(span)} names none of the {size} {noun}")
    return resolved


def _read_span(span: Span, subject: str) -> tuple[int, ...] | slice:
    if span is None or isinstance(span, str):
        raise SiteError(f"{subject} is {span!r}; expected 'each', 'all', a number or a list of them")
    chosen = read_choice(span, what=subject, error=SiteError)
    assert chosen is not None
    return (chosen,) if isinstance(chosen, int) else chosen
