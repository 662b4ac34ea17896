"""The formulas of merging, for a piece of one weight of all models: float64 tensors in, one float64 tensor out."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Agreement = Literal["mean", "sum", "max"]
"""How the task vectors that agree with the elected sign are put together."""

_PARALLEL = 1e-8


def average(tensors: Iterable[Float[Tensor, "*axes"]], shares: Sequence[float]) -> Float[Tensor, "*axes"]:
    """`sum_i shares[i] * tensors[i]`."""
    total: Tensor | None = None
    for tensor, share in zip(tensors, shares, strict=True):
        total = tensor * share if total is None else total.add(tensor, alpha=share)
    assert total is not None
    return total


def arc_shares(chord: float, doubled: float, t: float) -> tuple[float, float]:
    """What to take of each of two vectors to be at a share `t` of the arc between them (Shoemake 1985).

    The shares are `sin((1-t) w) / sin w` and `sin(t w) / sin w`, `w` the angle between the two. Where they point the
    same or the opposite way, the straight line between them is taken, which is the formula's limit for the same way;
    for opposite ones there is no shortest arc.

    Args:
        chord: the length of the difference of the two, each divided by its length.
        doubled: the length of their sum.
        t: how far along the arc.
    """
    # Well-conditioned for small angles too, which the arc cosine is not (Kahan).
    angle = 2 * math.atan2(chord, doubled)
    sine = math.sin(angle)
    if sine < _PARALLEL:
        return 1 - t, t
    return math.sin((1 - t) * angle) / sine, math.sin(t * angle) / sine


def merge_agreeing(deltas: Sequence[Float[Tensor, "*axes"]], agreement: Agreement) -> Float[Tensor, "*axes"]:
    """The task vectors' entries that have the elected sign, `sgn(sum_i delta_i)`, put together (Yadav et al. 2023).

    Args:
        deltas: the trimmed task vectors.
        agreement: `"mean"` (the paper's) over those that agree, their `"sum"`, or of them the largest in size.
    """
    stacked = torch.stack(list(deltas))
    elected = stacked.sum(0).sign()
    agreeing = torch.where(stacked.sign() == elected, stacked, 0.0)
    if agreement == "sum":
        return agreeing.sum(0)
    if agreement == "max":
        return agreeing.abs().amax(0) * elected
    return agreeing.sum(0) / (agreeing != 0).sum(0).clamp(min=1)


def drop(
    delta: Float[Tensor, "*axes"], sparsity: float, generator: torch.Generator, *, rescale: bool
) -> Float[Tensor, "*axes"]:
    """A task vector with entries set to 0 at random, the rest divided by `1 - sparsity` (Yu et al. 2024).

    Args:
        delta: the task vector.
        sparsity: the chance of an entry to become 0, below 1.
        generator: draws, on the CPU.
        rescale: divide; else the rest stays as it is.
    """
    # Draws of one generator come one after another, however many are asked for at once.
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64) >= sparsity
    thinned = torch.where(kept.to(delta.device), delta, 0.0)
    return thinned / (1 - sparsity) if rescale and sparsity > 0 else thinned
