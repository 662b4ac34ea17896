"""What every edit is: where it acts, at which tokens, and how a new value takes the old one's place."""

from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from hooklens.errors import EditError
from hooklens.hooks.call import TokenIndex
from hooklens.hooks.choice import Choice, Index, read_choice, resolve_choice
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint
from hooklens.hooks.region import Region, Selection, axes_in_canonical_order, choose_tokens, query_head_hint
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

    Positions, heads and rows are each an int, a slice, or a list, array or tensor of ints.
    """

    # Whether padding counts where no positions are chosen.
    counts_padding: ClassVar[bool] = True
    # Whether it computes with the activation, which nobody can do with numbers that name something.
    computes: ClassVar[bool] = True
    # What the new value of a token is made of: "token", of this token alone (and of what is laid over it); "row",
    # of all tokens of its row; "unknown", of more than this class can say, such as what a function remembers.
    reach: ClassVar[str] = "unknown"
    # The field that is laid over the region, where there is one.
    lays: ClassVar[str | None] = None

    name: NamesFilter
    _: KW_ONLY
    pos: Choice = None
    head: Choice = None
    query_head: Choice = None
    rows: Choice = None
    when: Literal["all", "prefill", "decode"] = "all"

    def __post_init__(self) -> None:
        if self.when not in ("all", "prefill", "decode"):
            raise EditError(f"{self._subject()}: when is {self.when!r}; expected 'all', 'prefill' or 'decode'")
        if self.head is not None and self.query_head is not None:
            raise EditError(
                f"{self._subject()}: head={self.head!r} and query_head={self.query_head!r} both choose heads; give one "
                "of them"
            )
        for field in ("pos", "head", "query_head", "rows"):
            self._read(field)

    def _read(self, field: str) -> Index:
        return read_choice(getattr(self, field), what=f"{self._subject()}: {field}", error=EditError)

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
        self.check_computable(point)
        chooses = not (self.pos is None and self._heads is None and self.rows is None)
        is_unpadded = tokens is None or tokens.positions_by_column is not None
        if not chooses and (self.counts_padding or is_unpadded or point.site is None):
            site, name = point.site, point.name or ""
            axes = site.axes if site is not None else tuple(f"axis {i}" for i in range(tensor.ndim))
            subject, shape = self._subject(name), tuple(tensor.shape)
            whole = Selection(subject=subject, point=point, tensor_shape=shape, n_rows=tensor.shape[0])
            return self.compute(tensor, axes, whole)
        return self._apply_to_region(tensor, point, tokens)

    def check_computable(self, point: HookPoint) -> None:
        """Refuse arithmetic with numbers that name something.

        Raises:
            EditError: the point holds such numbers, and the edit computes with them.
        """
        if self.computes and point.site is not None and point.site.discrete:
            raise EditError(
                f"{self._subject(point.name)}: the numbers there name something ({point.site.description}), so none is "
                "more than another; use Replace or Custom"
            )

    def _apply_to_region(self, tensor: Tensor, point: HookPoint, tokens: TokenIndex | None) -> Tensor | None:
        region = self.find_region(tensor, point, tokens)
        if region is None:
            return None
        canonical = tensor.permute(region.order)
        edited = canonical.clone()
        edited[region.index] = self.compute(canonical[region.index], region.axes, region.selection)
        return edited.permute([region.order.index(i) for i in range(len(region.order))])

    def find_region(self, tensor: Tensor, point: HookPoint, tokens: TokenIndex | None) -> Region | None:
        """The part of a tensor that the edit touches; None where this call runs no token of it.

        Args:
            tensor: what passes the point; its entries are not read.
            point: the hook point.
            tokens: which tokens the columns are; None: token `i` stands in column `i`.

        Raises:
            EditError: the edit's positions, heads or rows do not fit the tensor, or its axes are not known.
        """
        subject = self._subject(point.name)
        if point.site is None:
            raise EditError(
                f"{subject}: the axes of this point are not known, so no positions, heads or rows can be "
                "chosen; use edits.Custom"
            )
        order = axes_in_canonical_order(point.site.axes)
        canonical = tensor.permute(order)
        axes = tuple(point.site.axes[i] for i in order)
        has_heads = len(axes) > 2 and axes[2] in ("head", "kv_head")
        heads = self._resolve_heads(canonical, axes, point, has_heads=has_heads)
        rows = resolve_choice(
            self._read("rows"), canonical.shape[0], what=f"{subject}: rows", noun="rows", error=EditError
        )
        pos = self._read("pos")
        chosen = choose_tokens(pos, rows, canonical.shape[1], tokens, subject=subject, device=tensor.device)
        if chosen is None:
            return None
        selection = Selection(
            subject=subject,
            point=point,
            tensor_shape=tuple(tensor.shape),
            n_rows=len(rows),
            drop_pos=isinstance(pos, int),
            drop_head=isinstance(self._heads, int),
            heads_first=has_heads and "query" in axes,
            pair_row=chosen.row,
            layouts=chosen.layouts,
        )
        return Region(
            order=order,
            axes=("token", *axes[2:]),
            row=torch.as_tensor(rows, device=tensor.device)[chosen.row],
            column=chosen.column,
            heads=heads,
            selection=selection,
        )

    @property
    def _heads_field(self) -> str:
        return "head" if self.query_head is None else "query_head"

    @property
    def _heads(self) -> Index:
        return self._read(self._heads_field)

    def _resolve_heads(
        self, canonical: Tensor, axes: tuple[str, ...], point: HookPoint, *, has_heads: bool
    ) -> list[int] | None:
        field = self._heads_field
        if self._heads is None:
            return None
        if not has_heads:
            raise EditError(
                f"{self._subject(point.name)}: {field}={self._heads!r}, but its axes are "
                f"{list(point.site.axes if point.site else ())}, without heads"
            )
        noun, hint = "heads", ""
        if self.query_head is not None:
            noun = "query heads"
        elif axes[2] == "kv_head":
            noun, hint = "key-value heads", query_head_hint(point.name or "")
        what = f"{self._subject(point.name)}: {field}"
        return resolve_choice(self._heads, canonical.shape[2], what=what, noun=noun, hint=hint, error=EditError)

    def _subject(self, name: str | None = None) -> str:
        return f"edit {type(self).__name__}({name or self.name!r})"
