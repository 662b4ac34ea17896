"""Edits as values: what to change, where, and at which tokens.

An edit names a hook point (or several, by anything that selects names) and, where that applies, token
positions, heads and rows. It is immutable, can be compared, printed, listed, and reused; models accept edits
wherever they accept hooks.

Positions are token positions: 0 is a row's first real token, whatever padding stands around it and however
much of the sequence already lies in a key-value cache; negative positions count from the row's last real
token. Tokens that are not part of the current call are left alone.

Under grouped queries several query heads read one key-value head. `head` counts the heads that the tensor has,
which are key-value heads at `hook_k` and `hook_v`; `query_head` changes what single query heads read there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hooklens.axes import HookSite, find_site
from hooklens.errors import EditError
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint
from hooklens.hooks.selection import (
    Indices,
    Selection,
    TokenIndex,
    axes_in_canonical_order,
    in_slice,
    query_head_hint,
    resolve_indices,
)
from hooklens.hooks.values import TensorValue


@dataclass(frozen=True)
class Edit(TensorValue, ABC):
    """Base of all edits; a new kind is a frozen dataclass that defines `compute`.

    Edits of one kind with equal fields are equal: tensors by their entries, functions by identity.

    Attributes:
        name: the hook point, or any filter that selects hook points.
        pos: token positions to edit; None: all.
        head: heads to edit, for tensors with a head axis; None: all. Key-value heads where the tensor has those.
        query_head: the same, always counted in query heads. At `hook_k` and `hook_v` of a network with grouped
            queries the edit acts at `hook_k_per_head` and `hook_v_per_head`, so on what these query heads read; the
            other query heads of their group read on as before.
        rows: rows of the batch to edit; None: all.
        when: while generating, act on the prompt (`"prefill"`), on new tokens (`"decode"`) or on both.
    """

    name: NamesFilter
    _: KW_ONLY
    pos: Indices = None
    head: Indices = None
    query_head: Indices = None
    rows: Indices = None
    when: Literal["all", "prefill", "decode"] = "all"

    def __post_init__(self) -> None:
        if self.when not in ("all", "prefill", "decode"):
            raise EditError(f"{self._subject()}: when is {self.when!r}; expected 'all', 'prefill' or 'decode'")
        if self.head is not None and self.query_head is not None:
            raise EditError(
                f"{self._subject()}: head={self.head!r} and query_head={self.query_head!r} both choose heads; give one "
                "of them"
            )

    @abstractmethod
    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
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
        if self.pos is None and self._heads is None and self.rows is None:
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
        order = axes_in_canonical_order(site.axes)
        canonical = tensor.permute(order)
        axes = tuple(site.axes[i] for i in order)
        has_heads = len(axes) > 2 and axes[2] in ("head", "kv_head")
        if self._heads is not None and not has_heads:
            raise EditError(
                f"{subject}: {self._heads_field}={self._heads!r}, but its axes are {list(site.axes)}, without heads"
            )

        rows = resolve_indices(self.rows, canonical.shape[0], f"{subject}: rows", "rows")
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
            drop_head=isinstance(self._heads, int),
            heads_first=has_heads and "query" in axes,
            pair_row=pair_row,
            layouts=((columns.shape[1], pair_slot),),
        )
        if isinstance(self.pos, slice):
            selection = selection.with_slice(self.pos, batch_index, pos_index, tokens, canonical.shape[1])
        if has_heads and self._heads is not None:
            heads = self._resolve_heads(canonical.shape[2], axes[2], name)
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
            return columns, in_slice(token_index, self.pos, n_tokens)
        wanted = torch.as_tensor([self.pos] if isinstance(self.pos, int) else list(self.pos), device=device)
        absolute = torch.where(wanted[None, :] < 0, wanted[None, :] + n_tokens[:, None], wanted[None, :])
        outside = (absolute < 0) | (absolute >= n_tokens[:, None])
        if outside.any() and (tokens is None or tokens.phase == "prefill"):
            row, slot = (int(i) for i in outside.nonzero()[0])
            raise EditError(
                f"{subject}: position {int(wanted[slot])} is outside row {rows[row]}, which has {int(n_tokens[row])} "
                "tokens"
            )
        doubled = (absolute[:, :, None] == absolute[:, None, :]).sum((1, 2)) > absolute.shape[1]
        if doubled.any():
            row = rows[int(doubled.nonzero()[0])]
            raise EditError(f"{subject}: pos={self.pos!r} names a token of row {row} twice; name it once")
        matches = token_index[:, None, :] == absolute[:, :, None]
        return matches.int().argmax(-1), matches.any(-1)

    @property
    def _heads_field(self) -> str:
        return "head" if self.query_head is None else "query_head"

    @property
    def _heads(self) -> Indices:
        return self.head if self.query_head is None else self.query_head

    def _resolve_heads(self, n_heads: int, axis: str, name: str) -> list[int]:
        noun, hint = "heads", ""
        if self.query_head is not None:
            noun = "query heads"
        elif axis == "kv_head":
            noun, hint = "key-value heads", query_head_hint(name)
        return resolve_indices(self._heads, n_heads, f"{self._subject(name)}: {self._heads_field}", noun, hint=hint)

    def _subject(self, name: str | None = None) -> str:
        return f"edit {type(self).__name__}({name or self.name!r})"


@dataclass(frozen=True)
class Replace(Edit):
    """Put `value` in the place of the activation.

    Example:
        `Replace("blocks.3.hook_resid_pre", clean_cache["resid_pre", 3][:, -1], pos=-1)`
    """

    value: Tensor | float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The value, laid over the region."""
        return selection.lay_over(self.value, region, region_axes)


@dataclass(frozen=True)
class Add(Edit):
    """Add `value` to the activation, as in activation steering."""

    value: Tensor | float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region plus the value."""
        return region + selection.lay_over(self.value, region, region_axes)


@dataclass(frozen=True)
class Scale(Edit):
    """Multiply the activation by `factor`."""

    factor: float

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region times the factor."""
        return region * self.factor


@dataclass(frozen=True)
class Zero(Edit):
    """Set the activation to zero."""

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """Zeros."""
        return torch.zeros_like(region)


@dataclass(frozen=True)
class Mean(Edit):
    """Replace the activation by its mean over the tokens (rows and positions) the edit selects.

    With `pos`, `head` and `rows` left out the mean is over all columns of all rows; give `pos=slice(None)`
    to leave padding out of it.
    """

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The mean over tokens, for every token."""
        axes = [i for i, axis in enumerate(region_axes) if axis in ("token", "batch", "pos", "query")]
        return region.mean(dim=axes or [0], keepdim=True).expand_as(region)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
