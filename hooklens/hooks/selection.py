"""Which part of a tensor an edit touches: token positions, heads and rows, and how a value is laid over them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.axes import find_site, layer_of, name_repeats
from hooklens.errors import EditError, join_names

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


def axes_in_canonical_order(axes: tuple[str, ...]) -> list[int]:
    """Batch first, then the position axis, then heads, then the rest."""
    position = "query" if "query" in axes else "pos"
    front = [axes.index("batch"), axes.index(position)]
    heads = [i for i, axis in enumerate(axes) if axis in ("head", "kv_head")]
    return front + heads + [i for i in range(len(axes)) if i not in front + heads]


def resolve_indices(wanted: Indices, size: int, subject: str, noun: str, *, hint: str = "") -> list[int]:
    """The rows, heads or positions that an edit names, counted from 0.

    Raises:
        EditError: one of them is out of range.
    """
    if wanted is None:
        return list(range(size))
    if isinstance(wanted, slice):
        return list(range(size))[wanted]
    indices = [wanted] if isinstance(wanted, int) else list(wanted)
    outside = [index for index in indices if not -size <= index < size]
    if outside:
        raise EditError(f"{subject}: {outside} out of range; there are {size} {noun}, 0 to {size - 1}{hint}")
    return [index % size for index in indices]


def query_head_hint(name: str) -> str:
    """What to do where somebody looked for a query head among key-value heads."""
    return "" if name_repeats(name) is None else "; where query heads share these, query_head= chooses a query head"


def place_query_heads(names: Sequence[str], known: Collection[str], subject: str) -> list[str]:
    """The hook points at which an edit of single query heads acts.

    Keys and values that query heads share are edited where each query head has a copy of its own.

    Args:
        names: the hook points that the edit names.
        known: all hook points of the model.
        subject: the edit, for messages.

    Raises:
        EditError: points without query heads; all of them are named.
    """
    placed, unfit = [], []
    for name in names:
        site = find_site(name)
        if site is not None and "head" in site.axes:
            placed.append(name)
        elif site is None or "kv_head" not in site.axes:
            unfit.append(name)
        elif not _shares_heads(name, known):
            placed.append(name)
        elif (repeated := name_repeats(name)) is not None:
            placed.append(repeated)
        else:
            unfit.append(name)
    if unfit:
        raise EditError(
            f"{subject}: query_head, but there are no query heads at {join_names(unfit, limit=5)}; of keys and values "
            "that query heads share, what one of them reads can be edited at hook_k and hook_v"
        )
    return list(dict.fromkeys(placed))


def _shares_heads(name: str, known: Collection[str]) -> bool:
    """Whether several query heads read one key-value head in the block that `name` lies in."""
    keys = name_repeats(f"blocks.{layer_of(name)}.attn.hook_k")
    return keys in known


def in_slice(token_index: Tensor, wanted: slice, n_tokens: Tensor) -> Tensor:
    """Which columns hold tokens inside a slice of each row's positions."""
    inside = torch.zeros_like(token_index, dtype=torch.bool)
    for row, length in enumerate(n_tokens.tolist()):
        chosen = torch.tensor(range(*wanted.indices(int(length))), device=token_index.device)
        inside[row] = torch.isin(token_index[row], chosen)
    return inside
