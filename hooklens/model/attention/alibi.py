"""Attention with linear biases (Press et al. 2022, "Train Short, Test Long").

A head adds `slope * position of the key` to its scores; a term that is the same for all keys of a query
falls out of the softmax, so this is the paper's distance penalty.

The fused attention kernels take such a term only as a full query x key mask. It is handed to them inside the dot
product instead: queries get extra entries that hold a slope, keys extra entries that hold their position, and their
product is the term. Keys know nothing of slopes, so query heads that share keys go on sharing them. Half precision
loses nothing of the term: a position is split into digits that the dtype holds exactly, and a slope into a rounded
part and what that leaves.

A term whose product is rounded (`AlibiPositions(bfloat16=True)`) does not split in this way: there the keys hold the
rounded terms, an entry for each query head that shares them, and queries pick theirs.

The entries are the same in all layers: make them once per call (`make_alibi_entries`).
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.config import AlibiPositions, HookedConfig
from hooklens.model.attention.attend import repeat_heads
from hooklens.model.plan.positions import TokenPlan
from hooklens.precision import wide_dtype

# Kernels on accelerators want head widths in multiples of eight.
_WIDTH_STEP = 8

# What a slope is split to hold, as float32 does.
_SLOPE_BITS = 24

# A digit of a position times 2 to this is still a float16; the rest of a digit's weight stands beside the slope.
_KEY_SHIFT = 5


class AlibiEntries(NamedTuple):
    """What queries and keys get appended: the product of the two is the term over the score scale.

    Attributes:
        query: `[1 1 head extra]`.
        key: `[rows key key_head extra]`; one key head where all share their entries.
    """

    query: Tensor
    key: Tensor


class AlibiTables:
    """The biases of a network's calls, made once in each for all layers.

    Args:
        alibi: how the term is rounded and scaled.
        cfg: the network's heads.
        score_scale: what the scores are multiplied by.

    Attributes:
        part: which of how many equal parts of the heads are computed here.
    """

    def __init__(self, alibi: AlibiPositions, cfg: HookedConfig, score_scale: float) -> None:
        self._alibi, self._cfg, self._score_scale = alibi, cfg, score_scale
        self.part: tuple[int, int] = (0, 1)

    def term(self, plan: TokenPlan, dtype: torch.dtype) -> Float[Tensor, "rows key head"]:
        """What each head adds to its scores at each key of a call."""
        return plan.remember(
            ("alibi term", self._alibi, self._score_scale, dtype),
            lambda: alibi_term(self._alibi, self._slopes(plan), plan.key_positions, self._score_scale, dtype),
        )

    def entries(self, plan: TokenPlan, keys: range, dtype: torch.dtype, *, n_rows: int | None = None) -> AlibiEntries:
        """What the queries of a call and some of its keys (of the first rows only) get appended."""
        return plan.remember(
            ("alibi entries", self._alibi, self._score_scale, keys, dtype),
            lambda: make_alibi_entries(
                self._alibi,
                self._slopes(plan),
                plan.key_positions[:n_rows, keys.start : keys.stop],
                n_positions=plan.n_positions,
                n_kv_heads=max(1, self._cfg.n_kv_heads // self.part[1]),
                score_scale=self._score_scale,
                dtype=dtype,
            ),
        )

    def _slopes(self, plan: TokenPlan) -> Float[Tensor, " head"]:
        n_heads, (part, n_parts) = self._cfg.n_heads, self.part
        slopes = plan.remember(("alibi slopes", n_heads), lambda: alibi_slopes(n_heads, plan.device))
        return slopes if n_parts == 1 else slopes.chunk(n_parts)[part]


def alibi_slopes(n_heads: int, device: torch.device | str = "cpu") -> Float[Tensor, " head"]:
    """The slope of each head: a geometric sequence, with every other term of the next finer one past a power of 2.

    They are computed on the device, since copying them there would wait for it. They are no weights, and small: on
    the CPU also while a model is laid out on the meta device.
    """
    n_even = 2 ** (n_heads.bit_length() - 1)
    steps = torch.arange(1, n_even + 1, dtype=torch.float64, device=device)
    exponents = steps * (-8 / n_even)
    if n_heads > n_even:
        finer = (2 * steps[: n_heads - n_even] - 1) * (-4 / n_even)
        exponents = torch.cat([exponents, finer])
    return torch.exp2(exponents).to(torch.float32)


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


def make_alibi_entries(
    alibi: AlibiPositions,
    slopes: Float[Tensor, " head"],
    key_positions: Int[Tensor, "rows key"],
    *,
    n_positions: int,
    n_kv_heads: int,
    score_scale: float,
    dtype: torch.dtype,
) -> AlibiEntries:
    """The extra entries of queries and keys, for all layers of a call; see `fold_into_heads`.

    Args:
        alibi: how the term is rounded and scaled.
        slopes: of each query head; on the device of the positions, or each call copies them there.
        key_positions: position of each key.
        n_positions: a bound on the positions: all are below it.
        n_kv_heads: key-value heads of the model.
        score_scale: what the scores are multiplied by.
        dtype: of queries and keys.
    """
    slopes = slopes.to(key_positions.device)
    unscale = 1.0 if alibi.scaled else 1 / score_scale
    if alibi.bfloat16:
        query, key = _rounded_entries(slopes, key_positions, n_kv_heads, unscale, dtype)
    else:
        query, key = _exact_entries(slopes, key_positions, n_positions, unscale, dtype)
    still = (0, -query.shape[-1] % _WIDTH_STEP)
    return AlibiEntries(F.pad(query, still)[None, None], F.pad(key, still))


def _exact_entries(
    slopes: Tensor, key_positions: Tensor, n_positions: int, unscale: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "head extra"], Float[Tensor, "rows key one extra"]]:
    """Parts of the slope for queries, digits of the position for keys, each of them against each."""
    bits = _exact_bits(dtype)
    n_digits = max(1, -(-(n_positions - 1).bit_length() // bits))
    parts = _split(slopes.double() * unscale, dtype)
    query, key = [], []
    for digit in range(n_digits):
        on_key = min(bits * digit, _KEY_SHIFT)
        numbers = (key_positions >> (bits * digit)) & (2**bits - 1)
        numbers = (numbers << on_key).to(dtype)
        query += [part * 2.0 ** (bits * digit - on_key) for part in parts]
        key += [numbers] * len(parts)
    return torch.stack(query, -1), torch.stack(key, -1)[:, :, None]


def _rounded_entries(
    slopes: Tensor, key_positions: Tensor, n_kv_heads: int, unscale: float, dtype: torch.dtype
) -> tuple[Float[Tensor, "head extra"], Float[Tensor, "rows key kv_head extra"]]:
    """The rounded terms of a group's heads for keys; for queries what undoes the score scale, at their own entry."""
    terms = slopes.bfloat16() * key_positions[..., None]
    group = len(slopes) // n_kv_heads
    key = terms.to(dtype).view(*key_positions.shape, n_kv_heads, group)
    own = torch.eye(group, dtype=dtype, device=slopes.device).repeat(n_kv_heads, 1)
    factors = (
        [1.0] if unscale == 1.0 else _split(torch.full((1,), unscale, dtype=torch.float64, device=own.device), dtype)
    )
    return torch.cat([own * factor for factor in factors], -1), key.repeat(1, 1, 1, len(factors))


def _split(numbers: Float[Tensor, " head"], dtype: torch.dtype) -> list[Tensor]:
    """Numbers of the dtype whose sum is as exact as float32: the rounded one, what that leaves, and so on."""
    parts = []
    for _ in range(-(-_SLOPE_BITS // _exact_bits(dtype))):
        parts.append(numbers.to(dtype))
        numbers = numbers - parts[-1]
    return parts


def _exact_bits(dtype: torch.dtype) -> int:
    """Integers of so many bits are exact in the dtype."""
    return 1 - round(math.log2(torch.finfo(dtype).eps))


def fold_into_heads(
    q: Float[Tensor, "batch query head d_head"],
    k: Float[Tensor, "rows key key_head d_head"],
    v: Float[Tensor, "rows key value_head d_head"],
    entries: AlibiEntries,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values that give the biased attention without a mask.

    Keys have the model's key-value heads, or a head for each query head. Values are padded to the new width: drop the
    last entries of the result.
    """
    return fold_into_queries(q, entries), *fold_into_keys(k, v, entries)


def fold_into_queries(
    q: Float[Tensor, "batch query head d_head"], entries: AlibiEntries
) -> Float[Tensor, "batch query head wide"]:
    """The queries of `fold_into_heads`; entries of all parts of a call's keys have the same for queries."""
    return torch.cat([q, entries.query.expand(*q.shape[:3], -1)], -1)


def fold_into_keys(
    k: Float[Tensor, "rows key key_head d_head"], v: Float[Tensor, "rows key value_head d_head"], entries: AlibiEntries
) -> tuple[Float[Tensor, "rows key key_head wide"], Float[Tensor, "rows key value_head wide"]]:
    """The keys and values of `fold_into_heads`."""
    key = entries.key if entries.key.shape[2] == 1 else repeat_heads(entries.key, k.shape[2])
    return torch.cat([k, key.expand(*k.shape[:3], -1)], -1), F.pad(v, (0, key.shape[-1]))
