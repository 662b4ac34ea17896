"""Which positions to take: `pos_slice`, which captures and caches read in one way."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hooklens.errors import InputError

PosSlice = int | slice | Sequence[int] | Tensor | None
"""Positions by an int, a slice, or a list or tensor of ints; negative ones count from the end, None is all."""

Positions = int | slice | list[int]


def read_pos_slice(pos_slice: PosSlice) -> Positions | None:
    """A `pos_slice` in plain Python numbers; arrays and tensors of integers are lists.

    Raises:
        InputError: it is of another kind. So is a mask, which counts nothing, and a tuple, which TransformerLens
            reads as the arguments of a slice and torch as a list.
    """
    if pos_slice is None:
        return None
    if isinstance(pos_slice, str | tuple):
        hint = " can mean a slice (in TransformerLens) or a list" if isinstance(pos_slice, tuple) else ""
        raise _not_positions(pos_slice, hint)
    try:
        if isinstance(pos_slice, slice):
            # Python's own check of start, stop and step.
            range(0)[pos_slice]
            return pos_slice
        plain = pos_slice.tolist() if hasattr(pos_slice, "tolist") else pos_slice
        index = torch.as_tensor(plain)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _not_positions(pos_slice) from error
    whole = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if index.ndim > 1 or not index.numel() or not whole:
        hint = " is a mask, take mask.nonzero()[:, 0]" if index.dtype == torch.bool and index.ndim else ""
        raise _not_positions(pos_slice, hint)
    positions: int | list[int] = index.tolist()
    return positions


def resolve_positions(positions: Positions, n_positions: int, *, where: str) -> list[int]:
    """The positions counted from 0.

    Args:
        positions: what `read_pos_slice` gave.
        n_positions: how many there are.
        where: ends the sentence "5 positions ...", for messages.

    Raises:
        InputError: a position is out of range. A slice is cut to what there is, as Python does.
    """
    if isinstance(positions, slice):
        return list(range(n_positions)[positions])
    wanted = [positions] if isinstance(positions, int) else positions
    if any(not -n_positions <= position < n_positions for position in wanted):
        raise InputError(f"pos_slice={positions!r} is out of range: {n_positions} positions {where}")
    return [position % n_positions for position in wanted]


def _not_positions(found: object, hint: str = "") -> InputError:
    return InputError(f"pos_slice={found!r}{hint}; expected an int, a slice, or a list of at least one int")
