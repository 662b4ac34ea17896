"""How each weight lies in memory, and the views between its logical shape and that.

A linear map is stored as `nn.Linear` has it, `[out, in]`; the field writes it the other way round, with an axis for
heads. A stored axis may hold several logical ones merged: `W_Q`, logically `[head d_model d_head]`, is stored as
`[(head d_head) d_model]`. Splitting and permuting are views whatever the strides, so a logical weight is always a view
of the stored one, never a copy.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

Layout = tuple[tuple[str, ...], ...]
"""The stored axes, each with the logical axes merged in it."""


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
    """A logical weight as it is stored, contiguous: a view where it lies so, else a copy."""
    return stored_view(weight, layout, axes).contiguous()


def hold(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """A logical weight as it is stored, by rows or by columns: a view where its memory can be a parameter's.

    A copy keeps the order in which the entries lie, so that rows are copied as rows: none is turned.
    """
    held = view_to_hold(weight, layout, axes)
    if held is None:
        held = view_to_hold(weight.clone(), layout, axes)
    return to_stored(weight, layout, axes) if held is None else held


def view_to_hold(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."] | None:
    """A logical weight as it is stored, without a copy, if that can be a parameter; else None."""
    sizes = dict(zip(axes, weight.shape, strict=True))
    try:
        stored = in_order(weight, layout, axes).view([math.prod(sizes[axis] for axis in group) for group in layout])
    except RuntimeError:
        # Axes that are merged do not follow each other in memory.
        return None
    return stored if can_be_held(stored) else None


def can_be_held(stored: Float[Tensor, "..."]) -> bool:
    """Whether a tensor can be a parameter as it lies in memory, by rows or by columns.

    Its entries fill their memory without gaps: PyTorch's fused optimizers go through a parameter's memory from its
    first entry on, whatever its strides, and would change what lies between. And a matrix has one axis of stride 1, as
    matrix products read it without a copy.
    """
    strides = [(stride, size) for stride, size in zip(stored.stride(), stored.shape, strict=True) if size != 1]
    filled = 1
    for stride, size in sorted(strides):
        if stride != filled:
            return False
        filled *= size
    return stored.ndim < 2 or 1 in stored.shape[-2:] or 1 in stored.stride()[-2:]


def lay_out(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """The same logical shape and values, as a view of contiguous stored memory; the tensor itself where it is one."""
    stored = stored_view(weight, layout, axes)
    if stored.is_contiguous() and stored.data_ptr() == weight.data_ptr():
        return weight
    return logical_view(stored.contiguous(), layout, axes, weight.shape)
