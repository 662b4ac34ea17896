"""Sums over pairs in place of their values: enough for means and standard errors, and for nothing else."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """How many values each cell had, their mean, and the sum of their squared distances from it.

    Groups are joined by the formula of Chan et al. 1983 ("Algorithms for Computing the Sample Variance"), which loses
    no digits where the mean is far from 0. All in float64.

    Attributes:
        table: `[3 ...]`: number, mean, sum of squares.
    """

    table: Float[Tensor, "3 ..."]

    @classmethod
    def none(cls, *shape: int, device: torch.device) -> "Moments":
        """Those of no values."""
        return cls(torch.zeros(3, *shape, dtype=torch.float64, device=device))

    @property
    def n(self) -> Float[Tensor, "*axes"]:
        """How many values there were."""
        return self.table[0]

    @property
    def mean(self) -> Float[Tensor, "*axes"]:
        """Their mean; NaN where there were none."""
        return self.table[1].masked_fill(self.n == 0, torch.nan)

    @property
    def standard_errors(self) -> Float[Tensor, "*axes"]:
        """The standard errors of the mean; NaN where there were fewer than two."""
        spread = (self.table[2] / (self.n - 1)).sqrt() / self.n.sqrt()
        return spread.masked_fill(self.n < 2, torch.nan)

    def add(self, cells: Sequence[int] | slice, values: Float[Tensor, "cells pairs"]) -> "Moments":
        """These and more values of some cells of one axis."""
        rows = cells if isinstance(cells, slice) else list(cells)
        new = values.to(self.table)
        n_old, mean_old, squares_old = self.table[:, rows]
        n_new, mean_new = new.shape[-1], new.mean(-1)
        total = n_old + n_new
        away = mean_new - mean_old
        joined = torch.stack(
            [
                total,
                mean_old + away * n_new / total,
                squares_old + (new - mean_new[:, None]).square().sum(-1) + away.square() * n_old * n_new / total,
            ]
        )
        table = self.table.clone()
        table[:, rows] = joined
        return Moments(table)
