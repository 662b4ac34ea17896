"""Edits as values: what to change, where, and at which tokens.

An edit names a hook point (or several, by anything that selects names) and, where that applies, token
positions, heads and rows. It is immutable, can be compared by identity, listed, and reused; models accept
edits wherever they accept hooks.

Positions are token positions: 0 is a row's first real token, whatever padding stands around it and however
much of the sequence already lies in a key-value cache; negative positions count from the row's last real
token. Tokens that are not part of the current call are left alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.axes import HookSite, find_site
from hooklens.errors import EditError
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint

Phase = Literal["prefill", "decode"]
Indices = int | Sequence[int] | slice | None


@runtime_checkable
class TokenIndex(Protocol):
    """Which tokens a call runs: what an edit needs to find its positions.

    Attributes:
        token_index: `[batch pos]`, the position of each column's token in its row's whole sequence; -1 for
            padding.
        n_tokens: `[batch]`, real tokens of each row so far, those in a cache included.
        phase: `"prefill"`, or `"decode"` while generating.
    """

    @property
    def token_index(self) -> Tensor:
        """`[batch pos]`."""

    @property
    def n_tokens(self) -> Tensor:
        """`[batch]`."""

    @property
    def phase(self) -> Phase:
        """What the call is part of."""


@dataclass(frozen=True, eq=False)
class Edit(ABC):
    """Base of all edits; a new kind defines `compute`.

    Attributes:
        name: the hook point, or any filter that selects hook points.
        pos: token positions to edit; None: all.
        head: heads to edit, for tensors with a head axis; None: all.
        rows: rows of the batch to edit; None: all.
        when: while generating, act on the prompt (`"prefill"`), on new tokens (`"decode"`) or on both.
    """

    name: NamesFilter
    _: KW_ONLY
    pos: Indices = None
    head: Indices = None
    rows: Indices = None
    when: Literal["all", "prefill", "decode"] = "all"

    def __post_init__(self) -> None:
        if self.when not in ("all", "prefill", "decode"):
            raise EditError(f"{self._subject()}: when is {self.when!r}; expected 'all', 'prefill' or 'decode'")

    @abstractmethod
    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: "Selection") -> Tensor:
        """The new values of a region, in the region's shape.

        Args:
            region: the tokens and heads this edit touches. Its first axis, `token`, runs over the pairs of
                row and position when the edit selects any of them; otherwise axes are the hook point's own.
            region_axes: the names of the region's axes.
            selection: which rows, positions and heads the region holds.
        """

    def apply(self, tensor: Tensor, point: HookPoint, tokens: TokenIndex | None) -> Tensor | None:
        """The edited tensor, out of place; None when the edit has nothing to do in this call.

        Raises:
            EditError: the edit's positions, heads, rows or value do not fit the tensor.
        """
        if tokens is not None and self.when not in ("all", tokens.phase):
            return None
        name = point.name or ""
        site = find_site(name)
        if self.pos is None and self.head is None and self.rows is None:
            axes = site.axes if site is not None else tuple(f"axis {i}" for i in range(tensor.ndim))
            whole = Selection(subject=self._subject(name), tensor_shape=tuple(tensor.shape), n_rows=tensor.shape[0])
            return self.compute(tensor, axes, whole)
        if site is None:
            raise EditError(
                f"{self._subject(name)}: the axes of this point are not known, so no positions, heads or rows can be "
                "chosen; use edits.Custom"
            )
        return self._apply_to_region(tensor, site, name, tokens)

    def _apply_to_region(self, tensor: Tensor, site: HookSite, name: str, tokens: TokenIndex | None) -> Tensor | None:
        subject = self._subject(name)
        order = _axes_in_canonical_order(site.axes)
        canonical = tensor.permute(order)
        axes = tuple(site.axes[i] for i in order)
        has_heads = len(axes) > 2 and axes[2] in ("head", "kv_head")
        if self.head is not None and not has_heads:
            raise EditError(f"{subject}: head={self.head!r}, but its axes are {list(site.axes)}, without heads")

        rows = _resolve_indices(self.rows, canonical.shape[0], f"{subject}: rows", "rows")
        columns, real = self._find_columns(rows, canonical.shape[1], subject, tokens, tensor.device)
        pair_row, pair_slot = real.nonzero(as_tuple=True)
        if pair_row.numel() == 0:
            return None
        batch_index = torch.as_tensor(rows, device=tensor.device)[pair_row]
        pos_index = columns[pair_row, pair_slot]
        index: tuple[Tensor, ...] = (batch_index, pos_index)
        region_axes = ("token", *axes[2:])
        selection = Selection(
            subject=subject,
            tensor_shape=tuple(tensor.shape),
            n_rows=len(rows),
            drop_pos=isinstance(self.pos, int),
            drop_head=isinstance(self.head, int),
            heads_first=has_heads and "query" in axes,
            pair_row=pair_row,
            layouts=((columns.shape[1], pair_slot),),
        )
        if isinstance(self.pos, slice):
            selection = selection.with_slice(self.pos, batch_index, pos_index, tokens, canonical.shape[1])
        if has_heads and self.head is not None:
            heads = _resolve_indices(self.head, canonical.shape[2], f"{subject}: head", "heads")
            index = (batch_index[:, None], pos_index[:, None], torch.as_tensor(heads, device=tensor.device)[None, :])
        region = canonical[index]
        edited = canonical.clone()
        edited[index] = self.compute(region, region_axes, selection)
        inverse = [order.index(i) for i in range(len(order))]
        return edited.permute(inverse)

    def _find_columns(
        self, rows: list[int], n_columns: int, subject: str, tokens: TokenIndex | None, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The column of each wanted position in each row, `[rows positions]`, and which of them are in this call."""
        if tokens is None:
            n_tokens = torch.full((len(rows),), n_columns, device=device)
            token_index = torch.arange(n_columns, device=device).expand(len(rows), n_columns)
        else:
            chosen = torch.as_tensor(rows, device=device)
            n_tokens = tokens.n_tokens.to(device)[chosen]
            token_index = tokens.token_index.to(device)[chosen]
            if token_index.shape[1] != n_columns:
                raise EditError(
                    f"{subject}: this call computes {n_columns} of {token_index.shape[1]} positions here "
                    "(logits_at), so positions cannot be matched; edit at ln_final or leave logits_at out"
                )
        if self.pos is None or isinstance(self.pos, slice):
            columns = torch.arange(n_columns, device=device).expand(len(rows), n_columns)
            if self.pos is None:
                return columns, token_index >= 0
            return columns, _in_slice(token_index, self.pos, n_tokens)
        wanted = torch.as_tensor([self.pos] if isinstance(self.pos, int) else list(self.pos), device=device)
        absolute = torch.where(wanted[None, :] < 0, wanted[None, :] + n_tokens[:, None], wanted[None, :])
        outside = (absolute < 0) | (absolute >= n_tokens[:, None])
        if outside.any() and (tokens is None or tokens.phase == "prefill"):
            row, slot = (int(i) for i in outside.nonzero()[0])
            raise EditError(
                f"{subject}: position {int(wanted[slot])} is outside row {rows[row]}, which has {int(n_tokens[row])} "
                "tokens"
            )
        matches = token_index[:, None, :] == absolute[:, :, None]
        return matches.int().argmax(-1), matches.any(-1)

    def _subject(self, name: str | None = None) -> str:
        return f"edit {type(self).__name__}({name or self.name!r})"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The part of a tensor that an edit touches, and how a value is laid over it.

    Attributes:
        subject: the edit, for messages.
        tensor_shape: shape of the whole tensor.
        n_rows: rows selected.
        drop_pos, drop_head: a single int was given, so a value has no such axis.
        heads_first: the tensor's head axis stands before its position axis.
        pair_row: for each entry of the region's `token` axis, which selected row it is; None when the region is
            the whole tensor.
        layouts: the sizes that a value's position axis may have, each with the index on it of every entry of the
            `token` axis.
    """

    subject: str
    tensor_shape: tuple[int, ...]
    n_rows: int
    drop_pos: bool = False
    drop_head: bool = False
    heads_first: bool = False
    pair_row: Tensor | None = None
    layouts: tuple[tuple[int, Tensor], ...] = ()

    def with_slice(
        self, wanted: slice, batch_index: Tensor, pos_index: Tensor, tokens: TokenIndex | None, n_columns: int
    ) -> "Selection":
        """The selection of a slice of positions: a value may also have just the positions in the slice.

        That needs as many of them in every row; whether a row's tokens are all part of this call does not matter.
        """
        if tokens is None:
            lengths, token_index = torch.full_like(batch_index, n_columns), pos_index
        else:
            lengths = tokens.n_tokens.to(pos_index.device)[batch_index]
            token_index = tokens.token_index.to(pos_index.device)[batch_index, pos_index]
        ranges = {length: range(*wanted.indices(length)) for length in set(lengths.tolist())}
        if len({len(positions) for positions in ranges.values()}) > 1:
            return self
        first = torch.zeros_like(lengths)
        for length, positions in ranges.items():
            first[lengths == length] = positions.start
        step = 1 if wanted.step is None else wanted.step
        n_positions = len(next(iter(ranges.values())))
        return replace(self, layouts=((n_positions, (token_index - first) // step), *self.layouts))

    def lay_over(self, value: Tensor | float, region: Tensor, region_axes: tuple[str, ...]) -> Tensor:
        """Bring a value to the region's shape.

        A value is a number; or has the shape of the selected part of the tensor (its axes in their own order, those
        chosen by a single int left out); or that without the batch axis, for all rows alike; or is a vector along
        the last axis. Nothing else is accepted, and nothing is cast.

        For a slice of positions, the position axis is the slice's length, where that is the same in all rows, or
        all columns of the call, of which the selected ones are read.

        Raises:
            EditError: the value has another shape, dtype or device.
        """
        if not isinstance(value, Tensor):
            return torch.full_like(region, value)
        if value.dtype != region.dtype or value.device != region.device:
            raise EditError(
                f"{self.subject}: the value is {value.dtype} on {value.device}, the activation {region.dtype} on "
                f"{region.device}; convert the value first"
            )
        if value.shape == region.shape[-1:] or value.ndim == 0:
            return value.expand_as(region)
        if self.pair_row is None:
            allowed = [tuple(region.shape), tuple(region.shape[1:])]
            if tuple(value.shape) in allowed:
                return value.expand_as(region)
            raise self._wrong_shape(value, allowed, region)
        allowed = []
        heads = list(region.shape[1:2]) if region_axes[1] in ("head", "kv_head") else []
        for n_positions, slot in self.layouts:
            positions = [] if self.drop_pos else [n_positions]
            kept_heads = [] if self.drop_head else heads
            front = kept_heads + positions if self.heads_first else positions + kept_heads
            per_row = (*front, *region.shape[1 + len(heads) :])
            allowed += [(self.n_rows, *per_row), per_row]
            if tuple(value.shape) in allowed[-2:]:
                n_laid = self.n_rows if value.ndim == len(per_row) + 1 else 1
                return self._spread(value, n_laid, n_positions, heads, region)[self.pair_row, slot]
        raise self._wrong_shape(value, allowed, region)

    def _spread(self, value: Tensor, n_laid: int, n_positions: int, heads: list[int], region: Tensor) -> Tensor:
        """A value as `[rows positions (heads) ...]`."""
        rest = region.shape[1 + len(heads) :]
        if self.heads_first and heads:
            laid = value.reshape(n_laid, *heads, n_positions, *rest).transpose(1, 2)
        else:
            laid = value.reshape(n_laid, n_positions, *heads, *rest)
        return laid.expand(self.n_rows, *laid.shape[1:])

    def _wrong_shape(self, value: Tensor, allowed: list[tuple[int, ...]], region: Tensor) -> EditError:
        shapes = " or ".join(str(list(shape)) for shape in dict.fromkeys(allowed))
        return EditError(
            f"{self.subject}: the value has shape {list(value.shape)}; expected {shapes} (without rows: for all rows "
            f"alike), a vector [{region.shape[-1]}], or a number; the activation is {list(self.tensor_shape)}"
        )


@dataclass(frozen=True, eq=False)
class Replace(Edit):
    """Put `value` in the place of the activation.

    Example:
        `Replace("blocks.3.hook_resid_pre", clean_cache["resid_pre", 3][:, -1], pos=-1)`
    """

    value: Tensor | float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The value, laid over the region."""
        return selection.lay_over(self.value, region, region_axes)


@dataclass(frozen=True, eq=False)
class Add(Edit):
    """Add `value` to the activation, as in activation steering."""

    value: Tensor | float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region plus the value."""
        return region + selection.lay_over(self.value, region, region_axes)


@dataclass(frozen=True, eq=False)
class Scale(Edit):
    """Multiply the activation by `factor`."""

    factor: float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region times the factor."""
        return region * self.factor


@dataclass(frozen=True, eq=False)
class Zero(Edit):
    """Set the activation to zero."""

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """Zeros."""
        return torch.zeros_like(region)


@dataclass(frozen=True, eq=False)
class Mean(Edit):
    """Replace the activation by its mean over the tokens (rows and positions) the edit selects.

    With `pos`, `head` and `rows` left out the mean is over all columns of all rows; give `pos=slice(None)`
    to leave padding out of it.
    """

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The mean over tokens, for every token."""
        axes = [i for i, axis in enumerate(region_axes) if axis in ("token", "batch", "pos", "query")]
        return region.mean(dim=axes or [0], keepdim=True).expand_as(region)


@dataclass(frozen=True, eq=False)
class Project(Edit):
    """Remove the span of `directions` from the activation's last axis, or keep nothing but it.

    Attributes:
        directions: `[d]` or `[k d]`, need be neither normalised nor orthogonal.
        keep: False removes the span (directional ablation), True removes everything else.
    """

    directions: Tensor
    keep: bool = False

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region with or without its part in the span."""
        directions = self.directions if self.directions.ndim == 2 else self.directions[None]
        if directions.ndim != 2 or directions.shape[-1] != region.shape[-1]:
            raise EditError(
                f"{selection.subject}: directions have shape {list(self.directions.shape)}; expected "
                f"[{region.shape[-1]}] or [k, {region.shape[-1]}]"
            )
        # QR is not implemented for half precision.
        basis = torch.linalg.qr(directions.to(device=region.device, dtype=torch.float64).T).Q.to(region.dtype)
        inside: Tensor = (region @ basis) @ basis.T
        return inside if self.keep else region - inside


@dataclass(frozen=True, eq=False)
class Custom(Edit):
    """Any other change, as a function.

    Attributes:
        fn: from the tokens and heads selected (`[token ...]`; the whole tensor when nothing is selected) to new
            values of the same shape.
    """

    fn: Callable[[Tensor], Tensor]

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """What `fn` makes of the region."""
        returned: Any = self.fn(region)
        if not isinstance(returned, Tensor) or returned.shape != region.shape or returned.dtype != region.dtype:
            found = (
                f"shape {list(returned.shape)}, {returned.dtype}"
                if isinstance(returned, Tensor)
                else f"a {type(returned).__name__}"
            )
            raise EditError(
                f"{selection.subject}: fn returned {found}; expected {region_axes} of shape {list(region.shape)}, "
                f"{region.dtype}"
            )
        return returned


def _axes_in_canonical_order(axes: tuple[str, ...]) -> list[int]:
    """Batch first, then the position axis, then heads, then the rest."""
    position = "query" if "query" in axes else "pos"
    front = [axes.index("batch"), axes.index(position)]
    heads = [i for i, axis in enumerate(axes) if axis in ("head", "kv_head")]
    return front + heads + [i for i in range(len(axes)) if i not in front + heads]


def _resolve_indices(wanted: Indices, size: int, subject: str, noun: str) -> list[int]:
    if wanted is None:
        return list(range(size))
    if isinstance(wanted, slice):
        return list(range(size))[wanted]
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    outside = [index for index in indices if not -size <= index < size]
    if outside:
        raise EditError(f"{subject}: {outside} out of range; there are {size} {noun}, 0 to {size - 1}")
    return [index % size for index in indices]


def _in_slice(token_index: Tensor, wanted: slice, n_tokens: Tensor) -> Tensor:
    """Which columns hold tokens inside a slice of each row's positions."""
    inside = torch.zeros_like(token_index, dtype=torch.bool)
    for row, length in enumerate(n_tokens.tolist()):
        chosen = torch.tensor(range(*wanted.indices(int(length))), device=token_index.device)
        inside[row] = torch.isin(token_index[row], chosen)
    return inside
