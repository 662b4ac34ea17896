"""How sure a mean over pairs is: standard errors, bootstrap intervals, permutation tests.

Pairs are taken for independent draws from the prompts that one wants to speak of. Intervals and p-values are
scipy's (the extra `stats`): `scipy.stats.bootstrap` (BCa, Efron 1987) and `scipy.stats.permutation_test`, which here
flips which of both runs of a pair was patched (Fisher's test of paired samples). With few pairs both say little: five
pairs have 32 ways to be flipped, so no p-value below 1/16 (two-sided).
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from hooklens.arguments import read_int, read_number, read_one_of
from hooklens.errors import HookLensError
from hooklens.optional import import_package

Method = Literal["BCa", "percentile", "basic"]
Alternative = Literal["two-sided", "less", "greater"]

Array = NDArray[Any]

# Resamples of so many numbers are held at once.
_ENTRIES_AT_ONCE = 2**24


class Interval(NamedTuple):
    """The ends of confidence intervals."""

    low: Float[Tensor, "..."]
    high: Float[Tensor, "..."]


def standard_error(per_pair: Float[Tensor, "*axes pair"]) -> Float[Tensor, "*axes"]:
    """The standard error of the mean over pairs: their standard deviation (n - 1) over the root of n.

    Raises:
        HookLensError: fewer than two pairs.
    """
    n_pairs = _count(per_pair, "a standard error")
    return per_pair.std(-1) / math.sqrt(n_pairs)


def bootstrap_interval(
    per_pair: Float[Tensor, "*axes pair"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 9999,
    method: Method = "BCa",
    seed: int = 0,
) -> Interval:
    """Bootstrap intervals of the mean over pairs, pairs drawn with replacement.

    Cells whose pairs have all the same value have an interval of no width.

    Args:
        per_pair: values.
        confidence: how often such intervals hold the mean.
        n_resamples: how often pairs are drawn.
        method: `"BCa"` (bias-corrected and accelerated), `"percentile"` or `"basic"`.
        seed: of the draws; all cells see the same ones.

    Raises:
        HookLensError: fewer than two pairs, or arguments that are none.
        MissingDependencyError: scipy is not installed.
    """
    options = _read_bootstrap(per_pair, confidence, n_resamples, method, seed)
    flat = _as_array(per_pair)
    varies = np.ptp(flat, axis=1) > 0
    return _bootstrap([flat], np.mean, flat.mean(1), varies, options, like=per_pair)


def bootstrap_ratio_interval(
    per_pair: Float[Tensor, "*axes pair"],
    whole: Float[Tensor, " pair"],
    *,
    confidence: float = 0.95,
    n_resamples: int = 9999,
    method: Method = "BCa",
    seed: int = 0,
) -> Interval:
    """Bootstrap intervals of a ratio of means over pairs, `mean(per_pair) / mean(whole)`.

    Both values of a pair are drawn together. Where means of `whole` on both sides of 0 are drawn, such an interval
    says nothing. Cells whose pairs have all the same share, up to rounding, have an interval of no width.

    Args:
        per_pair: values.
        whole: what they are a share of.
        confidence, n_resamples, method, seed: as for `bootstrap_interval`.

    Raises:
        HookLensError: fewer than two pairs, or arguments that are none.
        MissingDependencyError: scipy is not installed.
    """
    options = _read_bootstrap(per_pair, confidence, n_resamples, method, seed)
    flat, shared = _as_array(per_pair), _as_array(whole)
    shares = flat.mean(1) / shared.mean()
    # Shares of whole numbers such as the network's own values by themselves differ by rounding alone.
    rounding = 64 * torch.finfo(per_pair.dtype).eps * np.abs(shared).max()
    varies = np.ptp(flat - shares[:, None] * shared, axis=1) > rounding
    return _bootstrap([flat, np.broadcast_to(shared, flat.shape)], _ratio, shares, varies, options, like=per_pair)


def permutation_p_value(
    per_pair: Float[Tensor, "*axes pair"],
    base: Float[Tensor, " pair"],
    *,
    n_resamples: int = 9999,
    alternative: Alternative = "two-sided",
    seed: int = 0,
) -> Float[Tensor, "*axes"]:
    """p-values of "a patch changes nothing": how often flipping signs gives a mean difference as far from 0.

    Where all 2**n ways to flip are no more than `n_resamples`, all are tried and the p-value is exact.

    Args:
        per_pair: values of patched runs.
        base: values of the same pairs without a patch.
        n_resamples: how many ways to flip are tried.
        alternative: `"two-sided"`, or `"less"` or `"greater"`: patched runs have lower or higher values.
        seed: of what is flipped; all cells see the same.

    Raises:
        HookLensError: fewer than two pairs, or arguments that are none.
        MissingDependencyError: scipy is not installed.
    """
    n_pairs = _count(per_pair, "a permutation test")
    count = read_int(n_resamples, what="n_resamples", least=1, error=HookLensError)
    read_one_of(alternative, what="alternative", options=("two-sided", "less", "greater"), error=HookLensError)
    stats = import_package("scipy.stats")
    flat, start = _as_array(per_pair), _as_array(base)
    values = np.full(len(flat), np.nan)
    for rows in _chunks(np.flatnonzero(~np.isnan(flat).any(1)), 2 * n_pairs * count):
        values[rows] = stats.permutation_test(
            (flat[rows] - start,),
            _mean,
            permutation_type="samples",
            vectorized=True,
            axis=-1,
            n_resamples=count,
            alternative=alternative,
            random_state=_generator(seed),
        ).pvalue
    return torch.from_numpy(values).to(per_pair).view(per_pair.shape[:-1])


def _mean(values: Any, axis: int = -1) -> Any:
    return np.mean(values, axis=axis)


def _ratio(values: Any, whole: Any, axis: int = -1) -> Any:
    return np.mean(values, axis=axis) / np.mean(whole, axis=axis)


def _read_bootstrap(
    per_pair: Tensor, confidence: object, n_resamples: object, method: str, seed: int
) -> dict[str, Any]:
    """The options of scipy's bootstrap.

    Raises:
        HookLensError: fewer than two pairs, or arguments that are none.
    """
    _count(per_pair, "a bootstrap interval")
    level = read_number(
        confidence,
        what="confidence",
        expected="a number between 0 and 1",
        allows=lambda x: 0 < x < 1,
        error=HookLensError,
    )
    count = read_int(n_resamples, what="n_resamples", least=1, error=HookLensError)
    read_one_of(method, what="method", options=("BCa", "percentile", "basic"), error=HookLensError)
    _generator(seed)
    return {"confidence_level": level, "n_resamples": count, "method": method, "random_state": seed}


def _bootstrap(
    samples: list[Array], statistic: Any, values: Array, varies: Array, options: dict[str, Any], *, like: Tensor
) -> Interval:
    """Intervals of the rows that vary, around the values of the others; NaN where a value is.

    Args:
        samples: `[row pair]` each; their pairs are drawn together.
        statistic: of samples, along an axis.
        values: that of each row.
        varies: which rows do.
        options: of scipy's bootstrap; `random_state` is a seed, so that all rows see the same draws.
        like: what has the axes, dtype and device of the intervals, before a last axis.
    """
    stats = import_package("scipy.stats")
    ends = np.repeat(values[:, None], 2, axis=1)
    entries = samples[0].shape[1] * options["n_resamples"] * len(samples)
    for rows in _chunks(np.flatnonzero(varies & ~np.isnan(values)), entries):
        found = stats.bootstrap(
            tuple(sample[rows] for sample in samples),
            statistic,
            axis=-1,
            vectorized=True,
            paired=len(samples) > 1,
            **{**options, "random_state": _generator(options["random_state"])},
        ).confidence_interval
        ends[rows, 0], ends[rows, 1] = found.low, found.high
    low, high = (torch.from_numpy(end.copy()).to(like).view(like.shape[:-1]) for end in ends.T)
    return Interval(low, high)


def _count(per_pair: Tensor, what: str) -> int:
    n_pairs = per_pair.shape[-1]
    if n_pairs < 2:
        raise HookLensError(f"{what} needs at least two pairs; the result has {n_pairs}")
    return n_pairs


def _as_array(values: Tensor) -> Array:
    """Rows of pairs in float64, in which sums of a resample round far below any difference."""
    array: Array = values.detach().double().cpu().reshape(-1, values.shape[-1]).numpy()
    return array


def _chunks(rows: Array, entries_per_row: int) -> list[Array]:
    """Rows in parts whose resamples fit into memory."""
    size = max(1, _ENTRIES_AT_ONCE // entries_per_row)
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(read_int(seed, what="seed", least=0, error=HookLensError))
