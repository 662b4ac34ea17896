"""Attention with linear biases (Press et al. 2022, "Train Short, Test Long").

A head adds `slope * position of the key` to its scores; a term that is the same for all keys of a query
falls out of the softmax, so this is the paper's distance penalty.

The fused attention kernels take such a term only as a full query x key mask. It is handed to them inside
the dot product: keys get extra entries that hold the term and queries a constant 1, and nothing of that
size is made.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.config import AlibiPositions
from hooklens.model.attend import repeat_heads
from hooklens.precision import wide_dtype

# Kernels on accelerators want head widths in multiples of eight.
_EXTRA_ENTRIES = 8


def alibi_slopes(n_heads: int) -> Float[Tensor, " head"]:
    """The slope of each head: a geometric sequence, with every other term of the next finer one past a power of 2."""
    n_even = 2 ** (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / n_even) for i in range(1, n_even + 1)]
    slopes += [2 ** (-4 * j / n_even) for j in range(1, 2 * (n_heads - n_even), 2)]
    # On the CPU also while a model is laid out on the meta device: they are no weights, and small.
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")


def alibi_term(
    alibi: AlibiPositions,
    slopes: Float[Tensor, " head"],
    key_positions: Int[Tensor, "rows key"],
    score_scale: float,
    dtype: torch.dtype,
) -> Float[Tensor, "rows key head"]:
    """What each head adds to its scores at each key, in float32 (float64 for float64 activations)."""
    wide = wide_dtype(dtype)
    slopes = slopes.to(key_positions.device)
    if alibi.bfloat16:
        term = (slopes.bfloat16() * key_positions[..., None]).to(wide)
    else:
        term = slopes.to(wide) * key_positions[..., None]
    return term * score_scale if alibi.scaled else term


def fold_into_heads(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "rows key kv_head d_head"],
    v: Float[Tensor, "rows key value_head d_head"],
    term: Float[Tensor, "term_rows key head"],
    score_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that give the biased attention without a mask.

    The term is split into a part that the dtype holds and the rest, so half precision loses nothing of it.
    Where query heads share keys the keys are repeated, since every query head has its own slope. Values are
    padded to the new width: drop the last entries of the result.
    """
    n_heads = q.shape[2]
    k, v = repeat_heads(k, n_heads), repeat_heads(v, n_heads)
    unscaled = term / score_scale
    high = unscaled.to(k.dtype)
    low = (unscaled - high).to(k.dtype)
    extra = torch.stack([high, low], -1).expand(k.shape[0], -1, -1, -1)
    ones = torch.ones(*q.shape[:-1], 2, dtype=q.dtype, device=q.device)
    still = (0, _EXTRA_ENTRIES - 2)
    return (
        torch.cat([q, F.pad(ones, still)], -1),
        torch.cat([k, F.pad(extra, still)], -1),
        F.pad(v, (0, _EXTRA_ENTRIES)),
    )
