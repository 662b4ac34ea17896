"""How each weight lies in memory, and the views between its logical shape and that.

A linear map is stored as `nn.Linear` has it, `[out, in]`; the field writes it the other way round, with an axis for
heads. A stored axis may hold several logical ones merged: `W_Q`, logically `[head d_model d_head]`, is stored as
`[(head d_head) d_model]`. Splitting and permuting are views whatever the strides, so a logical weight is always a view
of the stored one, never a copy.
"""

import contextlib
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.weights.memory import HUGE_PAGE, empty_pages

Layout = tuple[tuple[str, ...], ...]
"""The stored axes, each with the logical axes merged in it."""

_FEWEST_ROWS = 64


def parse_stored(text: str) -> Layout:
    """`"(head d_head) d_model"` as `(("head", "d_head"), ("d_model",))`."""
    groups: list[tuple[str, ...]] = []
    merged: list[str] | None = None
    for word in text.replace("(", " ( ").replace(")", " ) ").split():
        if word == "(":
            merged = []
        elif word == ")":
            groups.append(tuple(merged or ()))
            merged = None
        elif merged is not None:
            merged.append(word)
        else:
            groups.append((word,))
    return tuple(groups)


def logical_view(
    stored: Float[Tensor, "..."], layout: Layout, axes: Sequence[str], shape: Sequence[int]
) -> Float[Tensor, "..."]:
    """A stored weight seen in its logical shape.

    Args:
        stored: as it lies in memory.
        layout: its axes.
        axes: the logical axes.
        shape: their sizes.
    """
    sizes = dict(zip(axes, shape, strict=True))
    split = stored
    for place in reversed(range(len(layout))):
        group = layout[place]
        if len(group) > 1:
            split = torch.unflatten(split, place, [sizes[axis] for axis in group])
    order = [axis for group in layout for axis in group]
    return split.permute([order.index(axis) for axis in axes])


def in_order(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """A logical weight with its axes in the order of the stored ones, none of them merged: always a view."""
    return weight.permute([list(axes).index(axis) for group in layout for axis in group])


def stored_view(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """A logical weight as it is stored: a view where its strides allow, else a copy."""
    ordered = in_order(weight, layout, axes)
    for place, group in enumerate(layout):
        if len(group) > 1:
            ordered = ordered.flatten(place, place + len(group) - 1)
    return ordered


def to_stored(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """A logical weight as it is stored, contiguous: a view where it lies so, else a copy, made fast."""
    ordered = in_order(weight, layout, axes)
    if ordered.is_contiguous():
        return stored_view(weight, layout, axes)
    sizes = dict(zip(axes, weight.shape, strict=True))
    shape = [math.prod(sizes[axis] for axis in group) for group in layout]
    with contextlib.suppress(RuntimeError):
        # Merged where that is a view: fewer and larger matrices.
        ordered = ordered.view(shape)
    return as_contiguous(ordered).view(shape)


def as_contiguous(stored: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same tensor in contiguous memory; itself where it lies so.

    A matrix that lies the other way round is turned in blocks that the cache holds. torch does so only with a whole
    matrix; of rows or columns of one it would take entry by entry, several times as slow.
    """
    if not is_turned(stored):
        return stored.contiguous()
    made = empty_pages(stored.shape, stored.dtype)
    n_columns = stored.shape[-1]
    n_held = HUGE_PAGE // stored.element_size()
    n_rows = min(max(n_held // n_columns, _FEWEST_ROWS), stored.shape[-2])
    held = empty_pages([max(n_rows * n_columns, n_held)], stored.dtype)
    matrices = stored.flatten(0, -3) if stored.ndim > 2 else [stored]
    for matrix, into in zip(matrices, made.view(-1, *made.shape[-2:]), strict=True):
        _turn(matrix, into, held, n_rows)
    return made


def is_turned(stored: Float[Tensor, "..."]) -> bool:
    """Whether it is a large tensor on the host whose rows do not lie in one piece each, so that copying it is slow."""
    is_plain = type(stored) is Tensor and stored.is_cpu and not stored.requires_grad
    return is_plain and stored.nbytes >= HUGE_PAGE and stored.ndim > 1 and stored.stride(-1) != 1


def _turn(stored: Tensor, made: Tensor, held: Tensor, n_rows: int) -> None:
    """Copy a matrix that lies by columns to where it lies by rows, so many rows at a time."""
    if stored.T.is_contiguous():
        made.copy_(stored)
        return
    for rows, into in zip(torch.split(stored, n_rows), torch.split(made, n_rows), strict=True):
        # By rows of what lies there, then as a whole matrix.
        columns = held[: rows.numel()].view(rows.shape[1], rows.shape[0])
        into.copy_(columns.copy_(rows.T).T)


def lay_out(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """The same logical shape and values, as a view of contiguous stored memory; the tensor itself where it is one."""
    stored = stored_view(weight, layout, axes)
    if stored.is_contiguous() and stored.data_ptr() == weight.data_ptr():
        return weight
    return logical_view(stored.contiguous(), layout, axes, weight.shape)
