"""Mean, norms and covariance of activations that come part by part."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.errors import InputError


@dataclass(frozen=True, eq=False, kw_only=True)
class SiteStatistics:
    """What a hook point's activations are like over all tokens, in float64.

    Attributes:
        n_tokens: the tokens.
        mean: of each entry.
        variance: of each entry, with n - 1 in the denominator; NaN of one token.
        mean_norm: the mean of the Euclidean norms; of several heads, of the flattened vectors.
        rms_norm: the root of the mean of their squares.
        covariance: of the flattened vectors, with n - 1 in the denominator; None where it was not asked for.
    """

    n_tokens: int
    mean: Float[Tensor, "*axes"]
    variance: Float[Tensor, "*axes"]
    mean_norm: float
    rms_norm: float
    covariance: Float[Tensor, "width width"] | None = None


class StatisticsSum:
    """Sums over parts, each about its own mean, so that nothing large cancels (Chan, Golub and LeVeque 1983).

    Args:
        covariance: also sum products of entries.
    """

    def __init__(self, *, covariance: bool) -> None:
        self._covariance = covariance
        self._n = 0
        self._norms, self._squares = 0.0, 0.0
        self._mean: Tensor | None = None
        self._about: Tensor | None = None

    def add(self, part: Float[Tensor, "token width"]) -> None:
        """Take more tokens."""
        if not len(part):
            return
        values = part.double()
        norms = values.norm(dim=-1)
        self._norms += float(norms.sum())
        self._squares += float(norms.square().sum())
        mean = values.mean(0)
        centred = values - mean
        about = centred.T @ centred if self._covariance else centred.square().sum(0)
        if self._mean is None or self._about is None:
            self._n, self._mean, self._about = len(values), mean, about
            return
        total = self._n + len(values)
        moved = mean - self._mean
        between = torch.outer(moved, moved) if self._covariance else moved.square()
        self._about = self._about + about + between * (self._n * len(values) / total)
        self._mean = self._mean + moved * (len(values) / total)
        self._n = total

    def finish(self, shape: tuple[int, ...]) -> SiteStatistics:
        """The statistics of vectors of a shape.

        Raises:
            InputError: there was no token.
        """
        if self._mean is None or self._about is None:
            raise InputError("statistics: there are no tokens")
        scatter = self._about / (self._n - 1) if self._n > 1 else torch.full_like(self._about, torch.nan)
        return SiteStatistics(
            n_tokens=self._n,
            mean=self._mean.view(shape),
            variance=(scatter.diagonal() if self._covariance else scatter).reshape(shape),
            mean_norm=self._norms / self._n,
            rms_norm=(self._squares / self._n) ** 0.5,
            covariance=scatter if self._covariance else None,
        )
