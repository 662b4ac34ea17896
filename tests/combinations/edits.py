"""Edits and hooks drawn at random, each in two forms: what the engine takes, and a plain function of cells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hooklens import edits
from hooklens.axes import name_repeats
from hooklens.config import HookedConfig
from tests.combinations.reference import Cells, PlainEdit


@dataclass(frozen=True)
class Running:
    """A call as edits see it.

    Attributes:
        before: tokens of each row that earlier calls ran.
        lengths: the same with this call's.
        columns: of this call's tokens.
        chosen: positions that the call unembeds; None: all.
    """

    before: list[int]
    lengths: list[int]
    columns: list[list[int]]
    chosen: list[list[int]] | None


@dataclass(frozen=True)
class EditCase:
    """An edit.

    Attributes:
        kind: its class.
        name: the point that it names.
        pos, rows: as in `hooklens.edits`.
        heads: which, with the keyword they are given by.
        heads_by: `"head"` or `"query_head"`.
        laid: a value is a number, a `"vector"`, or of the region's `"full"` shape.
        seed: of its numbers.
    """

    kind: str
    name: str
    pos: Any
    rows: Any
    heads: Any
    heads_by: str
    laid: str
    seed: int
    cfg: HookedConfig
    n_rows: int
    width: int

    @property
    def acts_at(self) -> str:
        """The point at which it acts."""
        if self.heads is None or self.heads_by == "head" or self.cfg.n_heads == self.cfg.n_kv_heads:
            return self.name
        return name_repeats(self.name) or self.name

    @property
    def _axes(self) -> tuple[str, ...]:
        return self.cfg.description.points[self.acts_at].axes

    @property
    def _n_heads(self) -> int | None:
        axis = next((axis for axis in self._axes if axis in ("head", "kv_head")), None)
        return None if axis is None else self.cfg.size(axis)

    @property
    def _head_list(self) -> list[int] | None:
        if self.heads is None or self._n_heads is None:
            return None
        given = [self.heads] if isinstance(self.heads, int) else self.heads
        return [head % self._n_heads for head in given]

    @property
    def _row_list(self) -> list[int]:
        given = range(self.n_rows) if self.rows is None else [self.rows] if isinstance(self.rows, int) else self.rows
        return [row % self.n_rows for row in given]

    def numbers(self, dtype: torch.dtype) -> Tensor | float:
        """The value, the factor or the directions."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind in ("Scale", "Zero", "Mean") or (self.laid == "number" and self.kind != "Project"):
            return 0.5 + (self.seed % 3) / 2
        size = self.cfg.size(self._axes[-1])
        shape: list[int] = [size]
        if self.kind == "Project":
            shape = [1 + self.seed % 2, size]
        elif self.laid == "full":
            positions = [] if isinstance(self.pos, int) else [self.width if self.pos is None else len(self.pos)]
            n_heads = [] if self._n_heads is None else [self._n_heads]
            if self.heads is not None:
                n_heads = [] if isinstance(self.heads, int) else [len(self.heads)]
            shape = [len(self._row_list), *positions, *n_heads, size]
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def basis(self) -> Tensor:
        """The orthonormal rows of an interchange, one or two."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        size = self.cfg.size(self._axes[-1])
        drawn = torch.randn(size, min(1 + self.seed % 2, size), generator=generator, dtype=torch.float64)
        return torch.linalg.qr(drawn).Q.T

    def as_edit(self, dtype: torch.dtype) -> edits.Edit:
        """What the engine takes."""
        where = {"pos": self.pos, "rows": self.rows, self.heads_by: self.heads}
        numbers = self.numbers(dtype)
        if self.kind in ("Zero", "Mean"):
            return getattr(edits, self.kind)(self.name, **where)
        if self.kind == "Project":
            return edits.Project(self.name, numbers, keep=self.seed % 3 == 0, **where)
        if self.kind == "Interchange":
            return edits.Interchange(self.name, self.basis(), numbers, **where)
        if self.kind == "Custom":
            return edits.Custom(self.name, lambda region: region * 2.0 - region * region, **where)
        return getattr(edits, self.kind)(self.name, numbers, **where)

    def fits(self, call: Running) -> bool:
        """Whether the rows have the positions, once each, by the end of this call."""
        if self.pos is None or isinstance(self.pos, slice):
            return True
        given = [self.pos] if isinstance(self.pos, int) else self.pos
        for row in self._row_list:
            n = call.lengths[row]
            if any(not -n <= p < n for p in given) or len({p % n for p in given}) < len(given):
                return False
        return True

    def as_plain(self, call: Running, dtype: torch.dtype) -> PlainEdit:
        """What it does in one call."""
        slots: dict[tuple[int, int], tuple[int, int | None]] = {}
        for i, row in enumerate(self._row_list):
            n = call.lengths[row]
            ran = range(call.before[row], n)
            if self.pos is None:
                wanted = {p: call.columns[row][p - call.before[row]] for p in ran}
            elif isinstance(self.pos, slice):
                wanted = dict.fromkeys(range(*self.pos.indices(n)), 0)
            elif isinstance(self.pos, int):
                wanted = {self.pos % n: None}
            else:
                wanted = {p % n: slot for slot, p in enumerate(self.pos)}
            for p, slot in wanted.items():
                is_kept = call.chosen is None or not self.name.startswith("unembed.") or p in call.chosen[row]
                if p in ran and is_kept:
                    slots[row, p] = (i, slot)
        return PlainEdit(self.acts_at, list(slots), self._head_list, self._change(slots, dtype))

    def _change(self, slots: dict, dtype: torch.dtype) -> Callable[[Cells], Cells]:
        numbers = self.numbers(dtype)
        numbers = numbers.double() if isinstance(numbers, Tensor) else numbers
        heads = self._head_list

        def value_at(row: int, position: int, head: int | None) -> Tensor | float:
            if self.laid != "full" or not isinstance(numbers, Tensor) or self.kind == "Project":
                return numbers
            i, slot = slots[row, position]
            here = numbers[i] if slot is None else numbers[i][slot]
            if head is None or isinstance(self.heads, int):
                return here
            return here[head if heads is None else heads.index(head)]

        def mean(cells: Cells) -> Cells:
            by_head: dict[int | None, list[Tensor]] = {}
            for (_, _, head), cell in cells.items():
                by_head.setdefault(head, []).append(cell)
            return {at: sum(by_head[at[2]]) / len(by_head[at[2]]) for at in cells}

        def project(cell: Tensor) -> Tensor:
            assert isinstance(numbers, Tensor)
            inside = numbers.T @ torch.linalg.solve(numbers @ numbers.T, numbers @ cell)
            return inside if self.seed % 3 == 0 else cell - inside

        if self.kind == "Mean":
            return mean
        one: dict[str, Callable[..., Tensor]] = {
            "Replace": lambda cell, value: torch.zeros_like(cell) + value,
            "Add": lambda cell, value: cell + value,
            "Scale": lambda cell, value: cell * value,
            "Zero": lambda cell, value: torch.zeros_like(cell),
            "Custom": lambda cell, value: 2.0 * cell - cell**2,
            "Project": lambda cell, value: project(cell),
            "Interchange": lambda cell, value: cell - self.basis().T @ (self.basis() @ (cell - value)),
        }
        return lambda cells: {at: one[self.kind](cell, value_at(*at)) for at, cell in cells.items()}


@dataclass(frozen=True)
class HookCase:
    """A hook that multiplies all that passes: `"in place"`, or by what it returns, `"dense"` or `"strided"`."""

    name: str
    factor: float
    form: str

    def as_hook(self) -> tuple[str, Callable[..., Tensor | None]]:
        def change(tensor, hook):
            assert hook.name == self.name
            if self.form == "in place":
                tensor.mul_(self.factor)
                return None
            product = tensor * self.factor
            return product if self.form == "dense" else product.transpose(0, -1).contiguous().transpose(0, -1)

        return self.name, change

    def as_plain(self, call: Running) -> PlainEdit:
        places = [
            (row, p)
            for row, n in enumerate(call.lengths)
            for p in range(call.before[row], n)
            if call.chosen is None or not self.name.startswith("unembed.") or p in call.chosen[row]
        ]
        return PlainEdit(self.name, places, None, lambda cells: {at: cell * self.factor for at, cell in cells.items()})


def kinds_at(name: str) -> list[str]:
    """Edits that have a meaning for every query alike, and keep numbers finite.

    What hides keys must go on hiding them: the plain network has no entries for those.
    """
    word = name.rpartition(".")[2]
    if word == "hook_attn_scores":
        return ["Scale", "Add"]
    if word == "hook_pattern":
        return ["Scale", "Zero"]
    if word == "hook_scale":
        return ["Scale"]
    return ["Replace", "Add", "Scale", "Zero", "Mean", "Project", "Interchange", "Custom"]


def _usable_points(points: list[str], scheme: str) -> list[str]:
    # A growing cache refuses edits of single query heads' keys and values.
    return [name for name in points if not (scheme == "grow" and name.endswith("_per_head"))]


@st.composite
def draw_edits(
    draw, cfg: HookedConfig, points: list[str], lengths: list[int], width: int, *, scheme: str, narrowed: bool
):
    count = draw(st.sampled_from([0, 1, 1, 2, 3]))
    return tuple(draw(draw_edit(cfg, points, lengths, width, scheme=scheme, narrowed=narrowed)) for _ in range(count))


@st.composite
def draw_edit(
    draw, cfg: HookedConfig, points: list[str], lengths: list[int], width: int, *, scheme: str, narrowed: bool
) -> EditCase:
    name = draw(st.sampled_from(_usable_points(points, scheme)))
    kind = draw(st.sampled_from(kinds_at(name)))
    axes = cfg.description.points[name].axes
    n_rows, shortest = len(lengths), min(lengths)
    rows = draw(st.one_of(st.none(), _choose(n_rows)))
    pos = draw(
        st.one_of(
            st.none(),
            st.integers(-shortest, shortest - 1),
            st.lists(st.integers(-shortest, -1), min_size=1, unique=True),
            st.lists(st.integers(0, shortest - 1), min_size=1, unique=True),
            st.sampled_from([slice(1, None), slice(-2, None), slice(None, None, 2), slice(0, 3)]),
        )
    )
    heads, heads_by = None, "head"
    axis = next((axis for axis in axes if axis in ("head", "kv_head")), None)
    if axis is not None and draw(st.booleans()):
        heads = draw(_choose(cfg.size(axis)))
        word = name.rpartition(".")[2]
        shares = axis == "kv_head" and cfg.n_heads != cfg.n_kv_heads
        if draw(st.booleans()) and (not shares or (word in ("hook_k", "hook_v") and scheme != "grow")):
            heads_by = "query_head"
            heads = draw(_choose(cfg.n_heads))
    laid = draw(st.sampled_from(["number", "vector", "full"]))
    is_whole = pos is None and rows is None and heads is None
    if "key" in axes:
        laid = "number"
    elif laid == "full":
        fits = (is_whole and not narrowed and scheme != "grow") or not (pos is None or isinstance(pos, slice))
        laid = "full" if fits else "vector"
    return EditCase(
        kind=kind, name=name, pos=pos, rows=rows, heads=heads, heads_by=heads_by, laid=laid,
        seed=draw(st.integers(0, 1000)), cfg=cfg, n_rows=n_rows, width=width,
    )  # fmt: skip


@st.composite
def draw_hooks(draw, points: list[str], *, scheme: str, in_place: bool):
    names = _usable_points(points, scheme)
    forms = ["dense", "strided", *(["in place"] if in_place else [])]
    hook = st.builds(HookCase, st.sampled_from(names), st.sampled_from([0.5, 1.25]), st.sampled_from(forms))
    return tuple(draw(hook) for _ in range(draw(st.sampled_from([0, 0, 1, 2]))))


def _choose(size: int):
    """An entry, or several, of an axis."""
    return st.one_of(st.integers(-size, size - 1), st.lists(st.integers(0, size - 1), min_size=1, unique=True))
