"""Which part of a tensor an edit touches: token positions, heads and rows, and how a value is laid over them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.axes import find_site, layer_of, name_repeats
from hooklens.errors import EditError, join_names
from hooklens.hooks.call import TokenIndex
from hooklens.hooks.choice import Index, resolve_choice
from hooklens.hooks.point import HookPoint


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The part of a tensor that an edit touches, and how a value is laid over it.

    Attributes:
        subject: the edit, for messages.
        point: the hook point that the tensor passes.
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
    point: HookPoint
    tensor_shape: tuple[int, ...]
    n_rows: int
    drop_pos: bool = False
    drop_head: bool = False
    heads_first: bool = False
    pair_row: Tensor | None = None
    layouts: tuple[tuple[int, Tensor], ...] = ()

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
            if not region.is_floating_point() and value != int(value):
                raise EditError(
                    f"{self.subject}: {value} among whole numbers ({region.dtype}); expected a whole number"
                )
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


class Region:
    """The part of a tensor that an edit touches.

    Attributes:
        order: the tensor's axes in canonical order: batch, position, heads, the rest.
        axes: the names of the part's axes: `token`, and those behind it.
        row, column: of each token.
        heads: the heads; None: all, or there are none.
        selection: the same, for what lays a value over it.
    """

    __slots__ = ("axes", "column", "heads", "order", "row", "selection")

    def __init__(
        self,
        *,
        order: list[int],
        axes: tuple[str, ...],
        row: Tensor,
        column: Tensor,
        heads: list[int] | None,
        selection: Selection,
    ) -> None:
        self.order, self.axes, self.row, self.column = order, axes, row, column
        self.heads, self.selection = heads, selection

    @property
    def index(self) -> tuple[Tensor, ...]:
        """Where the part stands in the tensor, its axes in canonical order."""
        if self.heads is None:
            return (self.row, self.column)
        heads = torch.as_tensor(self.heads, device=self.row.device)
        return (self.row[:, None], self.column[:, None], heads[None, :])


@dataclass(frozen=True, kw_only=True)
class ChosenTokens:
    """The tokens that rows and positions choose in one call, one entry each.

    Attributes:
        row: which selected row the token is in.
        column: its column in the tensor.
        layouts: as in `Selection`.
    """

    row: Tensor
    column: Tensor
    layouts: tuple[tuple[int, Tensor], ...]


def choose_tokens(
    pos: Index, rows: list[int], n_columns: int, tokens: TokenIndex | None, *, subject: str, device: torch.device
) -> ChosenTokens | None:
    """The tokens at some positions of some rows; None where this call runs none of them.

    Args:
        pos: positions in the rows' whole sequences.
        rows: rows of the batch.
        n_columns: columns of the tensor.
        tokens: which tokens these are; None: token `i` stands in column `i`.
        subject: the edit, for messages.
        device: where the tensor is.

    Raises:
        EditError: a position that a row does not have, or a token named twice.
    """
    positions = range(n_columns) if tokens is None else tokens.positions_by_column
    is_whole = tokens is None or tokens.phase == "prefill"
    if positions is None:
        assert tokens is not None
        return _choose_by_row(pos, rows, n_columns, tokens, subject=subject, device=device, is_whole=is_whole)
    length = n_columns if tokens is None else tokens.length
    chosen = _resolve_positions(pos, length, rows, subject=subject, is_whole=is_whole)
    place = {position: column for column, position in enumerate(positions)}
    is_listed = not (pos is None or isinstance(pos, slice))
    pairs = [(slot, place[position]) for slot, position in enumerate(chosen) if position in place]
    if not pairs or not rows:
        return None
    slot, column = torch.tensor(pairs, device=device).T
    row = torch.arange(len(rows), device=device).repeat_interleave(len(pairs))
    slot, column = slot.repeat(len(rows)), column.repeat(len(rows))
    by_column = (n_columns, column)
    layouts = ((len(chosen), slot),) if is_listed else ((len(chosen), slot), by_column)
    return ChosenTokens(row=row, column=column, layouts=layouts if pos is not None else (by_column,))


def _resolve_positions(pos: Index, length: int, rows: list[int], *, subject: str, is_whole: bool) -> list[int]:
    if pos is None or isinstance(pos, slice):
        return list(range(length)[slice(None) if pos is None else pos])
    wanted = (pos,) if isinstance(pos, int) else pos
    outside = [position for position in wanted if not -length <= position < length]
    if outside and is_whole and rows:
        raise EditError(f"{subject}: position {outside[0]} is outside row {rows[0]}, which has {length} tokens")
    within = tuple(position for position in wanted if position not in outside)
    return resolve_choice(within, length, what=f"{subject}: pos", noun="tokens", error=EditError)


def _choose_by_row(
    pos: Index,
    rows: list[int],
    n_columns: int,
    tokens: TokenIndex,
    *,
    subject: str,
    device: torch.device,
    is_whole: bool,
) -> ChosenTokens | None:
    """The same where rows have their tokens in different columns."""
    at = torch.as_tensor(rows, device=device)
    lengths, token_index = tokens.n_tokens.to(device)[at], tokens.token_index.to(device)[at]
    if pos is None or isinstance(pos, slice):
        found = token_index >= 0 if pos is None else _in_slice(token_index, pos, lengths)
        row, column = found.nonzero(as_tuple=True)
        layouts: tuple[tuple[int, Tensor], ...] = ((n_columns, column),)
        if pos is not None:
            layouts = (*_slice_layout(pos, lengths[row], token_index[row, column]), *layouts)
    else:
        wanted = torch.as_tensor([pos] if isinstance(pos, int) else list(pos), device=device)
        absolute = torch.where(wanted[None, :] < 0, wanted[None, :] + lengths[:, None], wanted[None, :])
        _check_absolute(pos, wanted, absolute, lengths, rows, subject=subject, is_whole=is_whole)
        matches = token_index[:, None, :] == absolute[:, :, None]
        row, slot = matches.any(-1).nonzero(as_tuple=True)
        column = matches.int().argmax(-1)[row, slot]
        layouts = ((len(wanted), slot),)
    if not row.numel():
        return None
    return ChosenTokens(row=row, column=column, layouts=layouts)


def _check_absolute(
    pos: Index,
    wanted: Tensor,
    absolute: Tensor,
    lengths: Tensor,
    rows: list[int],
    *,
    subject: str,
    is_whole: bool,
) -> None:
    outside = (absolute < 0) | (absolute >= lengths[:, None])
    if is_whole and outside.any():
        row, slot = (int(i) for i in outside.nonzero()[0])
        raise EditError(
            f"{subject}: position {int(wanted[slot])} is outside row {rows[row]}, which has {int(lengths[row])} tokens"
        )
    doubled = (absolute[:, :, None] == absolute[:, None, :]).sum((1, 2)) > absolute.shape[1]
    if doubled.any():
        row = rows[int(doubled.nonzero()[0])]
        raise EditError(f"{subject}: pos={pos!r} names a token of row {row} twice; name it once")


def _slice_layout(wanted: slice, lengths: Tensor, token_index: Tensor) -> tuple[tuple[int, Tensor], ...]:
    """Where each chosen token stands in the slice, if the slice has as many positions in every row.

    Whether a row's tokens are all part of this call does not matter.
    """
    ranges = {length: range(*wanted.indices(length)) for length in set(lengths.tolist())}
    if len({len(positions) for positions in ranges.values()}) != 1:
        return ()
    first = torch.zeros_like(lengths)
    for length, positions in ranges.items():
        first[lengths == length] = positions.start
    step = 1 if wanted.step is None else wanted.step
    return ((len(next(iter(ranges.values()))), (token_index - first) // step),)


def _in_slice(token_index: Tensor, wanted: slice, n_tokens: Tensor) -> Tensor:
    """Which columns hold tokens inside a slice of each row's positions."""
    inside = torch.zeros_like(token_index, dtype=torch.bool)
    for row, length in enumerate(n_tokens.tolist()):
        chosen = torch.tensor(range(*wanted.indices(int(length))), device=token_index.device)
        inside[row] = torch.isin(token_index[row], chosen)
    return inside


def axes_in_canonical_order(axes: tuple[str, ...]) -> list[int]:
    """Batch first, then the position axis, then heads, then the rest."""
    position = "query" if "query" in axes else "pos"
    front = [axes.index("batch"), axes.index(position)]
    heads = [i for i, axis in enumerate(axes) if axis in ("head", "kv_head")]
    return front + heads + [i for i in range(len(axes)) if i not in front + heads]


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
