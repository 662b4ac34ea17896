"""How each weight lies in memory, and the views between its logical shape and that.

A weight has the field's logical shape (`W_Q [heads, d_model, d_head]`) and the strides of a contiguous
`[out, in]` matrix, which is what `torch.nn.functional.linear` multiplies with, so a forward neither copies
nor permutes it:

| weight | logical shape | stored `[out, in]` |
|---|---|---|
| `W_Q`, `W_K`, `W_V` | `[heads, d_model, d_head]` | `[heads * d_head, d_model]` |
| `W_O` | `[heads, d_head, d_model]` | `[d_model, heads * d_head]` |
| `W_in`, `W_gate`, `W_out`, `W_U` | `[in, out]` | `[out, in]` |
| all others (`W_E`, `W_pos`, biases, norms) | any | the same |

Every function takes the parameter's name and looks at its last part only: `"blocks.3.attn.W_Q"` and `"W_Q"`
are alike.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.errors import InputError

# Weight -> the order in which its logical axes are stored; names that are not here are stored as they are.
_STORED_AXES: dict[str, tuple[int, ...]] = {
    "W_Q": (0, 2, 1),
    "W_K": (0, 2, 1),
    "W_V": (0, 2, 1),
    "W_O": (2, 0, 1),
    "W_in": (1, 0),
    "W_gate": (1, 0),
    "W_out": (1, 0),
    "W_U": (1, 0),
}
# Head weight -> the axis of the stored matrix in which heads and d_head are merged.
_HEAD_AXIS = {"W_Q": 0, "W_K": 0, "W_V": 0, "W_O": 1}


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def stored_view(name: str, weight: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """A weight as it is stored: `[out, in]` for the maps of the table above, any other tensor as it is.

    A contiguous view of a weight in stored layout; of one in another layout a copy, equal in value.
    """
    part = _last_part(name)
    axes = _STORED_AXES.get(part)
    if axes is None:
        return weight
    head_axis = _HEAD_AXIS.get(part)
    permuted = weight.permute(axes)
    return permuted if head_axis is None else permuted.flatten(head_axis, head_axis + 1)


def logical_view(name: str, stored: Float[Tensor, "..."], *, n_heads: int | None = None) -> Float[Tensor, "..."]:
    """The inverse of `stored_view`: a stored `[out, in]` matrix seen in the weight's logical shape, never a copy.

    Args:
        name: the parameter's name.
        stored: what a checkpoint holds; for names outside the table it comes back as it is.
        n_heads: heads of this weight, needed for head weights only (`W_K` and `W_V` have key-value heads).

    Raises:
        InputError: a head weight without `n_heads`, or with rows that do not divide into that many heads.
    """
    part = _last_part(name)
    axes = _STORED_AXES.get(part)
    if axes is None:
        return stored
    if (head_axis := _HEAD_AXIS.get(part)) is not None:
        merged = stored.shape[head_axis]
        if n_heads is None or merged % n_heads:
            raise InputError(
                f"{name}: axis {head_axis} of the stored matrix {tuple(stored.shape)} is heads * d_head = {merged}; "
                f"expected n_heads to divide it, got n_heads={n_heads}"
            )
        shape = stored.shape
        stored = stored.view(*shape[:head_axis], n_heads, merged // n_heads, *shape[head_axis + 1 :])
    return stored.permute(_inverse(axes))


def is_stored_layout(name: str, weight: Float[Tensor, "..."]) -> bool:
    """Whether the weight's strides are those of the table, so that `stored_view` copies nothing."""
    axes = _STORED_AXES.get(_last_part(name))
    return (weight if axes is None else weight.permute(axes)).is_contiguous()


def to_stored_layout(name: str, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The same logical shape and values with the table's strides; the tensor itself where it has them already."""
    axes = _STORED_AXES.get(_last_part(name))
    if axes is None:
        return tensor.contiguous()
    return tensor.permute(axes).contiguous().permute(_inverse(axes)) if not is_stored_layout(name, tensor) else tensor


def empty_weight(
    name: str,
    shape: Sequence[int],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "..."]:
    """An uninitialised tensor of a logical shape with the table's strides."""
    axes = _STORED_AXES.get(_last_part(name), tuple(range(len(shape))))
    stored = torch.empty([shape[axis] for axis in axes], device=device, dtype=dtype)
    return stored.permute(_inverse(axes))


def _inverse(axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(axes.index(axis) for axis in range(len(axes)))
