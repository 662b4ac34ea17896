"""The positions of a row that are no padding."""

from collections.abc import Mapping

from jaxtyping import Bool
from torch import Tensor

from hooklens.activation_cache.memory import take
from hooklens.errors import CacheError, join_names

Axes = tuple[str, ...] | None


def kept_positions(mask: Bool[Tensor, " pos"]) -> list[int]:
    """The positions that a mask marks as real."""
    return [index for index, keep in enumerate(mask.tolist()) if keep]


def strip_padding(tensor: Tensor, axes: Axes, kept: list[int], mask: Bool[Tensor, " key"]) -> Tensor:
    """An activation without the positions that `mask` rules out of its pos, query and key axes.

    Args:
        tensor: of one row.
        axes: its axes.
        kept: places on the pos and query axes that are no padding.
        mask: over past + new tokens, or over the new tokens only; past keys it does not cover are kept.
    """
    masked_keys = kept_positions(mask)
    for axis, word in enumerate(axes or ()):
        if word in {"pos", "query"}:
            tensor = take(tensor, axis, kept)
        elif word == "key":
            n_unmasked = tensor.shape[axis] - len(mask)
            tensor = take(tensor, axis, [*range(n_unmasked), *(n_unmasked + key for key in masked_keys)])
    return tensor


def check_positions(
    activations: Mapping[str, tuple[Tensor, Axes]], *, n_captured: int, n_new: int, n_masked: int
) -> None:
    """Refuse activations whose pos and query axes are not what was captured of the run, or whose keys are not all.

    Args:
        activations: tensors of one row, with their axes.
        n_captured: positions that were captured.
        n_new: positions of the run.
        n_masked: positions that the mask covers.

    Raises:
        CacheError: lists the activations that do not fit.
    """
    bad = []
    for name, (tensor, axes) in activations.items():
        if axes is None or len(axes) != tensor.ndim:
            bad.append(f"{name} {list(tensor.shape)}: its axes are not known")
            continue
        for word, size in zip(axes, tensor.shape, strict=True):
            if word in {"pos", "query"} and size != n_captured:
                bad.append(f"{name}: {size} positions")
            # A mask over the new tokens only says nothing about the keys of the past.
            if word == "key" and (size < n_masked or size > n_masked > n_new):
                bad.append(f"{name}: {size} keys")
    if bad:
        raise CacheError(
            f"unpad: the run has {n_new} new positions ({n_captured} captured) and a mask over {n_masked}, which do "
            f"not fit {join_names(bad, limit=5)}; capture without logits_at, and leave points outside the model's own "
            "out"
        )
