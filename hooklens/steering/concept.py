r"""Which affine map hides a concept from every linear probe, in closed form from means and covariances.

For vectors `x` and classes `z` (one-hot), no linear probe does better than the best constant one exactly if all classes
have the same mean (Belrose et al. 2023, "LEACE: Perfect linear concept erasure in closed form", theorem 3.1). Both maps
have the form `r(x) = x - L^T R (x - E[x])` and make the means equal:

- `"leace"`: with `W = (Sigma_xx^{1/2})^+` and `U` an orthonormal basis of the columns of `W Sigma_xz`, `R = U^T W` and
  `L = U^T W^+` (theorem 4.3): of all affine maps that hide the concept, the one with the least `E |r(x) - x|^2`.
- `"mean_difference"`: the orthogonal projection, `R = L` an orthonormal basis of the columns of `Sigma_xz`, which are
  spanned by the differences of the classes' means.

`R Sigma_xx` is what the formulas need, so that sums over batches suffice; they are taken in float64, about the mean.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

ErasureMethod = Literal["leace", "mean_difference"]


class AffineEraser(NamedTuple):
    """The map `x - writers^T readers (x - mean)`.

    Attributes:
        mean: of all tokens.
        readers: what is read of a token; one row fewer than there are classes, or less where their means have a lower
            rank.
        writers: what it is moved along.
        removed: `E |r(x) - x|^2` as a part of the variance `E |x - E[x]|^2`; 0 where nothing varies.
    """

    mean: Float[Tensor, " d"]
    readers: Float[Tensor, "rank d"]
    writers: Float[Tensor, "rank d"]
    removed: float


@dataclass(frozen=True, eq=False, kw_only=True)
class ConceptMoments:
    """Means and covariances of tokens and their classes, joined batch by batch (Chan et al. 1983).

    Attributes:
        counts: tokens of each class.
        means: of each class; zeros for one without tokens.
        scatter: `sum (x - E[x]) (x - E[x])^T`.
    """

    counts: Float[Tensor, " classes"]
    means: Float[Tensor, "classes d"]
    scatter: Float[Tensor, "d d"]

    @classmethod
    def of(cls, x: Float[Tensor, "n d"], labels: Int[Tensor, " n"], n_classes: int) -> "ConceptMoments":
        """Those of some tokens."""
        wide = x.double()
        member = torch.nn.functional.one_hot(labels, n_classes).to(wide)
        counts = member.sum(0)
        away = wide - wide.mean(0)
        means = (member.T @ wide) / counts.clamp(min=1)[:, None]
        return cls(counts=counts, means=means, scatter=away.T @ away)

    @property
    def n(self) -> Float[Tensor, ""]:
        """How many tokens there were."""
        return self.counts.sum()

    @property
    def mean(self) -> Float[Tensor, " d"]:
        """Of all tokens."""
        return (self.counts / self.n) @ self.means

    def join(self, other: "ConceptMoments") -> "ConceptMoments":
        """Those of the tokens of both."""
        counts = self.counts + other.counts
        share = other.counts / counts.clamp(min=1)
        away = other.mean - self.mean
        return ConceptMoments(
            counts=counts,
            means=self.means + share[:, None] * (other.means - self.means),
            scatter=self.scatter + other.scatter + torch.outer(away, away) * self.n * other.n / (self.n + other.n),
        )

    def erase(self, method: ErasureMethod) -> AffineEraser:
        """The map that hides the classes."""
        mean, covariance = self.mean, self.scatter / self.n
        # The columns of Sigma_xz but the last, which follows from the others since one-hot entries sum to one.
        crossed = ((self.counts / self.n)[:, None] * (self.means - mean))[:-1].T
        if method == "leace":
            root, inverse = _square_roots(covariance)
            basis = _column_basis(inverse @ crossed)
            readers, writers = basis.T @ inverse, basis.T @ root
        else:
            readers = writers = _column_basis(crossed).T
        change = writers.T @ readers
        moved = float(torch.trace(change @ covariance @ change.T))
        total = float(torch.trace(covariance))
        return AffineEraser(mean, readers, writers, moved / total if total else 0.0)


def _square_roots(covariance: Float[Tensor, "d d"]) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
    """The root of a covariance, and the pseudo-inverse of the root."""
    values, axes = torch.linalg.eigh(covariance)
    real = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    kept, axes = values[real].sqrt(), axes[:, real]
    return (axes * kept) @ axes.T, (axes / kept) @ axes.T


def _column_basis(matrix: Float[Tensor, "d k"]) -> Float[Tensor, "d rank"]:
    """An orthonormal basis of the columns' span."""
    U, S, _ = torch.linalg.svd(matrix, full_matrices=False)
    basis: Tensor = U[:, max(matrix.shape) * torch.finfo(S.dtype).eps * S[:1] < S]
    return basis
