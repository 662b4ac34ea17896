"""Low-rank changes of weights.

A change of a linear map `W [d_out d_in]` is the product of two thin matrices (LoRA; Hu et al. 2021, arXiv 2106.09685):
`W + s B A` with `A [r d_in]`, `B [d_out r]`. The scale `s` is `alpha / r`, or `alpha / sqrt(r)` where its size is not
to shrink with the rank (rsLoRA; Kalajdzievski 2023, arXiv 2312.03732). DoRA (Liu et al. 2024, arXiv 2402.09353) takes
the direction of each row from the changed map and its length from a vector of its own.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def lora_scale(alpha: float, rank: int, *, rslora: bool = False) -> float:
    """What the product of the two matrices is multiplied by: `alpha / rank`, with rsLoRA `alpha / sqrt(rank)`."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def lora_delta(
    A: Float[Tensor, "*piece rank d_in"], B: Float[Tensor, "*piece d_out rank"], scale: float = 1.0
) -> Float[Tensor, "*piece d_out d_in"]:
    """The change of a linear map: `scale B A`, in the dtype of `A` and `B`.

    Args:
        A: the matrix that reads the input.
        B: the matrix that writes the output.
        scale: see `lora_scale`.
    """
    return (B @ A) * scale


def dora_factor(changed: Float[Tensor, "d_out d_in"], magnitude: Float[Tensor, " d_out"]) -> Float[Tensor, "d_out 1"]:
    """What the rows of a changed map are multiplied by to have the lengths in `magnitude` (DoRA, equation 5).

    Args:
        changed: `W + s B A`.
        magnitude: the length of each row.
    """
    factor: Tensor = magnitude / torch.linalg.norm(changed, dim=1)
    return factor[:, None]
