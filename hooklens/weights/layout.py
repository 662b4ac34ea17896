"""How each weight lies in memory, and the views between its logical shape and that.

A linear map is stored as `nn.Linear` has it, `[out, in]`; the field writes it the other way round, with an axis for
heads. A stored axis may hold several logical ones merged: `W_Q`, logically `[head d_model d_head]`, is stored as
`[(head d_head) d_model]`. Splitting and permuting are views whatever the strides, so a logical weight is always a view
of the stored one, never a copy.
"""

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


def stored_view(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """A logical weight as it is stored: a view where its strides allow, else a copy."""
    permuted = weight.permute([list(axes).index(axis) for group in layout for axis in group])
    for place, group in enumerate(layout):
        if len(group) > 1:
            permuted = permuted.flatten(place, place + len(group) - 1)
    return permuted


def lay_out(weight: Float[Tensor, "..."], layout: Layout, axes: Sequence[str]) -> Float[Tensor, "..."]:
    """The same logical shape and values, as a view of contiguous stored memory; the tensor itself where it is one."""
    stored = stored_view(weight, layout, axes)
    if stored.is_contiguous() and stored.data_ptr() == weight.data_ptr():
        return weight
    return logical_view(stored.contiguous(), layout, axes, weight.shape)
