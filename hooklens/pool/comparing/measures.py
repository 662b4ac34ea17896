"""Distances of two models' activations at one hook point, and of what the two would predict from them.

Sums are taken in float64, over some tokens at a time. The formulas stand in `compare`.
"""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooklens.pool.comparing.activations import Trace, Vectors

Left = Float[Tensor, "token left"]
Right = Float[Tensor, "token right"]
Measure = Literal["cosine", "relative_norm", "kl", "cka", "biased_cka"]

# Entries of what is made at a time: 32 MiB in float64.
_CHUNK_ENTRIES = 2**22
_FEWEST_UNBIASED = 4


def compare_vectors(measure: Measure, first: Trace, second: Trace, name: str) -> float:
    """One distance of two models at a hook point; NaN where the two have other sizes than it needs."""
    x, y = first.vectors[name], second.vectors[name]
    if measure == "kl":
        return mean_kl(first, second, name)
    if measure in _SAME_WIDTH:
        return _SAME_WIDTH[measure](x, y) if x.shape == y.shape else math.nan
    return linear_cka(x, y, debiased=measure == "cka")


def mean_cosine(x: Vectors, y: Vectors) -> float:
    """The cosine between a token's two vectors, averaged over tokens; NaN where one of them is 0."""
    total = 0.0
    for one, other in _chunks(x, y):
        total += float(((one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))).sum())
    return total / len(x)


def mean_relative_norm(x: Vectors, y: Vectors) -> float:
    """`|y - x| / |x|` of a token's two vectors, averaged over tokens; 0 where both vectors are 0."""
    total = 0.0
    for one, other in _chunks(x, y):
        distance = (other - one).norm(dim=1)
        total += float(torch.where(distance == 0, 0.0, distance / one.norm(dim=1)).sum())
    return total / len(x)


_SAME_WIDTH: dict[str, Callable[[Vectors, Vectors], float]] = {
    "cosine": mean_cosine,
    "relative_norm": mean_relative_norm,
}


def mean_kl(first: Trace, second: Trace, name: str) -> float:
    """KL(first || second) of what each model's own end predicts from its stream, in nats, averaged over tokens."""
    n_outputs = first.reader.n_outputs
    if n_outputs != second.reader.n_outputs:
        return math.nan
    x, y = first.vectors[name], second.vectors[name]
    step = max(1, _CHUNK_ENTRIES // n_outputs)
    total = 0.0
    for start in range(0, len(x), step):
        p = first.reader.read(x[start : start + step]).double()
        q = second.reader.read(y[start : start + step]).double().to(p.device)
        total += float(F.kl_div(q, p, reduction="sum", log_target=True))
    return total / len(x)


def linear_cka(x: Left, y: Right, *, debiased: bool = True) -> float:
    """Centred kernel alignment with linear kernels, from 0 to 1; debiased it may leave these bounds by chance.

    Args:
        x: vectors of one model.
        y: vectors of another one on the same tokens, of any width.
        debiased: by the unbiased estimator of the Hilbert-Schmidt independence criterion; NaN for fewer than 4 tokens.

    Returns:
        The alignment; NaN where the vectors of one model are all alike.
    """
    if debiased and len(x) < _FEWEST_UNBIASED:
        return math.nan
    crossed = _hsic(x, y, debiased=debiased)
    own = _hsic(x, x, debiased=debiased), _hsic(y, y, debiased=debiased)
    # An estimate of what is never negative may be negative where tokens are few.
    return crossed / math.sqrt(own[0] * own[1]) if min(own) > 0 else math.nan


def _hsic(x: Left, y: Right, *, debiased: bool) -> float:
    """The criterion of two linear kernels up to a factor that the alignment does not have.

    With centred vectors, of squared lengths `a_i` and `b_i`, it is `||X^T Y||^2`, and unbiased (Song et al. 2012, for
    rows of the kernels that sum to 0 with their diagonals in)

        ||X^T Y||^2 - n / (n - 2) sum_i a_i b_i + (sum_i a_i) (sum_i b_i) / ((n - 1) (n - 2)).
    """
    n = len(x)
    squared, a, b = _cross(x, y)
    if not debiased:
        return squared
    return squared - n / (n - 2) * float(a @ b) + float(a.sum() * b.sum()) / ((n - 1) * (n - 2))


def _cross(x: Left, y: Right) -> tuple[float, Float[Tensor, " token"], Float[Tensor, " token"]]:
    """`||X^T Y||^2` of centred vectors, and the squared lengths of both."""
    means = [vectors.mean(0, dtype=torch.float64) for vectors in (x, y)]
    if len(x) <= min(x.shape[1], y.shape[1]):
        # The kernels, tokens by tokens, are smaller than the product of features.
        one, other = x.double() - means[0], y.double() - means[1]
        return float(((one @ one.T) * (other @ other.T)).sum()), one.square().sum(1), other.square().sum(1)
    product = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    lengths: list[Tensor] = []
    for raw, raw_other in _chunks(x, y):
        one, other = raw - means[0], raw_other - means[1]
        product += one.T @ other
        lengths.append(torch.stack([one.square().sum(1), other.square().sum(1)]))
    a, b = torch.cat(lengths, dim=1)
    return float(product.square().sum()), a, b


def _chunks(x: Left, y: Right) -> Iterator[tuple[Tensor, Tensor]]:
    """The vectors of some tokens at a time, in float64."""
    step = max(1, _CHUNK_ENTRIES // max(x.shape[1], y.shape[1], 1))
    for start in range(0, len(x), step):
        yield x[start : start + step].double(), y[start : start + step].double()
