"""The formulas of merging, for one weight of all models: float64 tensors in, one float64 tensor out."""

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


def slerp(first: Float[Tensor, "*axes"], second: Float[Tensor, "*axes"], t: float) -> Float[Tensor, "*axes"]:
    """`sin((1-t) w) / sin w * first + sin(t w) / sin w * second`, `w` the angle between the two (Shoemake 1985).

    The two are taken as vectors. Where one is 0, or they point the same or the opposite way, the straight line between
    them is taken, which is the formula's limit for the same way; for opposite ones there is no shortest arc.
    """
    length = first.norm() * second.norm()
    if float(length) == 0:
        return torch.lerp(first, second, t)
    # Well-conditioned for small angles too, which the arc cosine is not (Kahan).
    one, other = first / first.norm(), second / second.norm()
    angle = 2 * torch.atan2((one - other).norm(), (one + other).norm())
    sine = torch.sin(angle)
    if float(sine) < _PARALLEL:
        return torch.lerp(first, second, t)
    return (torch.sin((1 - t) * angle) / sine) * first + (torch.sin(t * angle) / sine) * second


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
    kept = torch.rand(delta.shape, generator=generator, dtype=torch.float64) >= sparsity
    thinned = torch.where(kept.to(delta.device), delta, 0.0)
    return thinned / (1 - sparsity) if rescale and sparsity > 0 else thinned
