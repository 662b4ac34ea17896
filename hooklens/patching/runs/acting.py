"""Edits at work: which tokens of a batch an experiment's edits change, wherever these stand in it.

In a batch of patched runs tokens stand in other rows and columns than in their prompts. `Places` says which are where;
an edit looks each of them up in the prompts, where it has laid its value out once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.axes import is_past_blocks, layer_of
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import EditError
from hooklens.hooks import HookPoint
from hooklens.hooks.call import Hook, Listeners, Listening
from hooklens.hooks.edits import Edit
from hooklens.hooks.region import Selection
from hooklens.model.plan.positions import TokenPlan
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.edits import RunEdits, chosen_pairs, has_keys, reach_of


@dataclass(frozen=True)
class Places:
    """Which tokens stand at the places of a batch.

    Attributes:
        pair: the pair of each row, counted in its group.
        column: the column of the pair's prompt at each place.
    """

    pair: Int[Tensor, " row"]
    column: Int[Tensor, "row place"]


@dataclass(frozen=True)
class _Group:
    """Some pairs, as `RunEdits.of_pairs` is told them."""

    pairs: tuple[int, ...]
    lengths: tuple[int, ...]
    n_pairs: int | None
    width: int
    device: torch.device

    def plan(self) -> TokenPlan:
        """All their columns, padded on the right."""
        lengths = torch.tensor(self.lengths, device=self.device)
        real = torch.arange(self.width, device=self.device) < lengths[:, None]
        mask = None if bool(real.all()) else real
        return TokenPlan(batch=len(self.pairs), n_new=self.width, device=self.device, attention_mask=mask)


def act_on_pairs(
    model: HookedCausalLM, prompts: PromptPairs, chosen: Sequence[int], edits: RunEdits
) -> "GroupEdits | None":
    """The edits in runs of some pairs; None where there are none.

    Args:
        model: the model.
        prompts: all pairs, or a part of them.
        chosen: which of them are run.
        edits: of the experiment.
    """
    if not edits:
        return None
    group = _Group(
        tuple(prompts.first + pair for pair in chosen),
        tuple(prompts.lengths[pair] for pair in chosen),
        prompts.n_pairs,
        max(prompts.lengths),
        model.device,
    )
    acting: dict[str, list[_Acting]] = {}
    for edit, points in zip(edits.edits, edits.points, strict=True):
        for name, point in points.items():
            acting.setdefault(name, []).append(_Acting(edit, point.called(name), group))
    return GroupEdits(edits, group, acting)


@dataclass(frozen=True, eq=False)
class GroupEdits:
    """The edits in the runs of some pairs, of which any tokens may stand at any place of a batch.

    Attributes:
        of_run: the experiment's.
        group: the pairs.
        acting: by hook name, what acts there.
    """

    of_run: RunEdits
    group: _Group
    acting: "dict[str, list[_Acting]]" = field(repr=False)

    @property
    def n_pairs(self) -> int:
        """Pairs of the group."""
        return len(self.group.pairs)

    def places(self, n_rows: int, width: int) -> Places:
        """The places of prompts in full, one set of the pairs' after another."""
        device = self.group.device
        columns = torch.arange(width, device=device).expand(n_rows, -1)
        return Places(torch.arange(n_rows, device=device) % self.n_pairs, columns)

    def listeners(
        self,
        model: HookedCausalLM,
        places: Places,
        names: Collection[str] | None = None,
        *,
        first_rows: int | None = None,
    ) -> Listeners:
        """What acts in a run.

        Args:
            model: the model.
            places: the tokens of the batch.
            names: the hook points at which it acts; None: all.
            first_rows: only so many rows are edited; None: all.
        """
        points = model.hook_points()
        chosen = {name: acting for name, acting in self.acting.items() if names is None or name in names}
        return {
            points[name]: Listening([Hook(_Apply(acting, places, first_rows), points[name], form="point")])
            for name, acting in chosen.items()
        }

    def in_layer(
        self, model: HookedCausalLM, layer: int, places: Places, n_inside: int, *, skip: Collection[str] = ()
    ) -> Listeners:
        """What acts in a block.

        Args:
            model: the model.
            layer: the block.
            places: the tokens of the batch.
            n_inside: rows that come from the block below; the others enter here, with the stream as the edits have
                left it.
            skip: hook points at which nothing acts.
        """
        if not self.acting:
            return {}
        entrance = f"blocks.{layer}.hook_resid_pre"
        names = [name for name in self.acting if layer_of(name) == layer and name not in skip]
        inside = self.listeners(model, places, [name for name in names if name != entrance])
        if entrance not in names or n_inside == 0:
            return inside
        return {**self.listeners(model, places, [entrance], first_rows=n_inside), **inside}

    def acts_behind_attention(self, layer: int) -> bool:
        """Whether something acts in a block on what comes after attention."""
        return any(layer_of(name) == layer and is_behind_attention(name) for name in self.acting)

    @property
    def names_in_head(self) -> list[str]:
        """The hook points past the last block at which something acts."""
        return [name for name in self.acting if is_past_blocks(name)]

    def of_one(self, model: HookedCausalLM, pair: int) -> Listeners:
        """What acts in a full forward of one prompt."""
        length = self.group.lengths[pair]
        places = Places(
            torch.tensor([pair], device=self.group.device), torch.arange(length, device=self.group.device)[None]
        )
        return self.listeners(model, places)


def is_behind_attention(name: str) -> bool:
    """Whether a hook point in a block stands behind its attention, where only the tokens that are read may be run."""
    return name.split(".")[2] in _BEHIND_ATTENTION


_BEHIND_ATTENTION = frozenset(
    {
        "hook_resid_mid",
        "hook_mlp_in",
        "hook_mlp_out",
        "hook_resid_post",
        "ln1_stream",
        "ln2",
        "mlp",
        "ln2_post",
        "ln2_stream",
    }
)


class _Apply:
    """A hook that applies edits to a batch, one after another."""

    def __init__(self, acting: "Sequence[_Acting]", places: Places, first_rows: int | None) -> None:
        self.acting, self.places, self.first_rows = acting, places, first_rows

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        for one in self.acting:
            tensor = one.apply(tensor, self.places, self.first_rows)
        return tensor


class _Acting:
    """One edit at one hook point, in runs of some pairs."""

    def __init__(self, edit: Edit, point: HookPoint, group: _Group) -> None:
        self.edit, self.point, self.group = edit, point, group
        self.by_token = reach_of(edit) == "token" and point.site is not None
        self._laid: _Laid | None = None

    def apply(self, tensor: Tensor, places: Places, first_rows: int | None) -> Tensor:
        """The edited tensor, out of place; the very tensor where nothing of it is edited."""
        if not self.by_token:
            return self._apply_row_by_row(tensor, places, first_rows)
        if self._laid is None:
            self._laid = self._lay(tensor)
        laid = self._laid
        slot = laid.slots[places.pair[:, None], places.column]
        if first_rows is not None:
            slot = slot[:first_rows]
        rows, at = (slot >= 0).nonzero(as_tuple=True)
        if not len(rows):
            return tensor
        index: tuple[Tensor, ...] = (rows, at)
        if laid.heads is not None:
            index = (rows[:, None], at[:, None], laid.heads[None])
        canonical = tensor.permute(laid.order)
        region = canonical[index]
        new = self._compute(laid, slot[rows, at], region)
        if has_keys(self.point.name or ""):
            # A prompt has no keys past its end, whatever stands beside it in the batch.
            lengths = torch.tensor(self.group.lengths, device=tensor.device)[places.pair[rows]]
            real = torch.arange(region.shape[-1], device=tensor.device) < lengths[:, None]
            new = torch.where(real[:, None], new, region)
        edited = canonical.clone()
        edited[index] = new
        return edited.permute([laid.order.index(axis) for axis in range(len(laid.order))])

    def _compute(self, laid: "_Laid", slots: Tensor, region: Tensor) -> Tensor:
        edit = self.edit
        if laid.value is not None:
            value = laid.value[slots]
            assert edit.lays is not None
            edit = replace(edit, **{edit.lays: value[..., : region.shape[-1]]})  # type: ignore[arg-type]
        shape = tuple(region.shape)
        whole = Selection(subject=laid.subject, point=self.point, tensor_shape=shape, n_rows=len(region))
        return edit.compute(region, laid.axes, whole)

    def _lay(self, tensor: Tensor) -> "_Laid":
        """The chosen tokens of all pairs, and the value that each of them is given."""
        self.edit.check_computable(self.point)
        site, group = self.point.site, self.group
        assert site is not None
        edit, n_chosen = self._of_group(tensor)
        shape = list(tensor.shape)
        for axis, name in enumerate(site.axes):
            if name in ("pos", "query", "key"):
                shape[axis] = group.width
        shape[0] = len(group.pairs)
        slots = torch.full([*shape[:1], group.width], -1, device=tensor.device)
        region = edit.find_region(tensor.new_empty(()).expand(shape), self.point, group.plan()) if n_chosen else None
        if region is None:
            return _Laid([], (), "", slots, None, None)
        slots[region.row, region.column] = torch.arange(len(region.row), device=tensor.device)
        heads = None if region.heads is None else torch.tensor(region.heads, device=tensor.device)
        value = _laid_by(edit)
        laid = None
        if isinstance(value, Tensor) and value.ndim > 0:
            rest = [shape[axis] for axis in region.order[2:]]
            if region.heads is not None:
                rest[0] = len(region.heads)
            like = tensor.new_empty(()).expand(len(region.row), *rest)
            laid = region.selection.lay_over(value, like, region.axes)
        return _Laid(region.order, region.axes, region.selection.subject, slots, heads, laid)

    def _of_group(self, tensor: Tensor) -> tuple[Edit, int]:
        """The edit for the group's pairs as rows of a batch, and how many of them it chooses."""
        edit, group = self.edit, self.group
        n_pairs = max(group.pairs) + 1 if group.n_pairs is None else group.n_pairs
        chosen = chosen_pairs(edit, n_pairs)
        place = {pair: index for index, pair in enumerate(chosen)}
        local = [row for row, pair in enumerate(group.pairs) if pair in place]
        changes: dict[str, object] = {"rows": local or None}
        value = _laid_by(edit)
        if edit.lays is not None and isinstance(value, Tensor) and self._has_rows(value):
            if group.n_pairs is None or len(value) != len(chosen):
                raise EditError(
                    f"edits: {edit!r}: the value has {len(value)} rows; expected one for each pair that it chooses "
                    f"({len(chosen) if group.n_pairs is not None else 'which come from a loader, so give none'}), or "
                    "no axis of rows"
                )
            changes[edit.lays] = value[[place[group.pairs[row]] for row in local]]
        return replace(edit, **changes), len(local)  # type: ignore[arg-type]

    def _has_rows(self, value: Tensor) -> bool:
        """Whether a value has an axis of rows before the others."""
        site = self.point.site
        assert site is not None
        heads = self.edit.head if self.edit.query_head is None else self.edit.query_head
        n_left_out = isinstance(self.edit.pos, int) + isinstance(heads, int)
        return value.ndim == len(site.axes) - n_left_out and (value.ndim > 1 or len(site.axes) == 2)

    def _apply_row_by_row(self, tensor: Tensor, places: Places, first_rows: int | None) -> Tensor:
        """What a call on each prompt alone would make of it: the rows are whole, and stand one by one."""
        edited = None
        n_rows = len(places.pair) if first_rows is None else first_rows
        n_pairs = max(self.group.pairs) + 1 if self.group.n_pairs is None else self.group.n_pairs
        chosen = set(chosen_pairs(self.edit, n_pairs))
        alone = self.edit if self.edit.rows is None else replace(self.edit, rows=[0])
        for row, pair in enumerate(places.pair[:n_rows].tolist()):
            if self.group.pairs[pair] not in chosen:
                continue
            length = self.group.lengths[pair]
            index = self._real(row, length)
            plan = TokenPlan(batch=1, n_new=length, device=tensor.device)
            new = alone.apply(tensor[index], self.point, plan)
            if new is not None:
                edited = tensor.clone() if edited is None else edited
                edited[index] = new
        return tensor if edited is None else edited

    def _real(self, row: int, length: int) -> tuple[slice, ...]:
        """One row's real tokens, on all axes that run over tokens."""
        axes = () if self.point.site is None else self.point.site.axes
        spans = [slice(length) if axis in ("pos", "query", "key") else slice(None) for axis in axes[1:]]
        return (slice(row, row + 1), *spans)


def _laid_by(edit: Edit) -> object:
    """What an edit lays over its region, if anything."""
    return None if edit.lays is None else getattr(edit, edit.lays)


@dataclass(frozen=True, eq=False)
class _Laid:
    """Where an edit acts in the prompts of a group.

    Attributes:
        order, axes, subject: as in `Region`.
        slots: `[pair column]`, the number of each chosen token; -1: it is not chosen.
        heads: the heads; None: all.
        value: `[token ...]`, the value of each chosen token; None: it is the same for all, or there is none.
    """

    order: list[int]
    axes: tuple[str, ...]
    subject: str
    slots: Int[Tensor, "pair column"]
    heads: Int[Tensor, " head"] | None
    value: Tensor | None
