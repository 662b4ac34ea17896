"""The trained part of distributed alignment search: an orthogonal matrix, and which of its rows each variable gets.

- DAS (Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
  Representations", arXiv 2303.02536): each variable gets a fixed number of rows.
- Boundless DAS (Wu et al. 2023, "Interpretability at Scale", arXiv 2305.08809): all `d` rows are trained, and
  boundaries say which belong to a variable. Row `i` belongs to a variable between boundaries `a` and `b` to the share
  `sigmoid((i - a) / T) sigmoid((b - i) / T)`, and the temperature `T` falls until shares are 0 or 1. The widths are
  kept small by a term of the loss.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hooklens.precision import wide_dtype

# Widths are shares of `d`; this is the least that a variable keeps while training.
_LEAST_WIDTH = 1e-3


class _Rows(nn.Module):
    """What is made orthogonal; a linear layer would draw its first weight from the global generator."""

    def __init__(self, rows: Float[Tensor, "k d"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)


class Rotation(nn.Module):
    """Orthonormal rows, parted among variables.

    Args:
        d: entries of a vector.
        n_dims: rows by variable; with `boundless` they are ignored but for their names.
        boundless: train widths, too.
        generator: draws the first rows; the global random state is neither read nor moved.
        dtype, device: of the vectors.
    """

    def __init__(
        self,
        d: int,
        n_dims: Mapping[str, int],
        *,
        boundless: bool,
        generator: torch.Generator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.n_dims, self.boundless, self.d = dict(n_dims), boundless, d
        n_rows = d if boundless else sum(n_dims.values())
        drawn = torch.linalg.qr(torch.randn(d, n_rows, generator=generator, dtype=torch.float64)).Q
        made = _Rows(drawn.T.contiguous().to(device, wide_dtype(dtype)))
        # Reflections reach every orthonormal set of rows, and need no square matrix. A trivialization would draw the
        # rows that are left out from the global generator.
        self.rows = parametrizations.orthogonal(made, orthogonal_map="householder", use_trivialization=False)
        self.temperature = 1.0
        self.widths: nn.Parameter | None = None
        if boundless:
            start = torch.full((len(n_dims),), 0.5 / len(n_dims), device=device, dtype=wide_dtype(dtype))
            self.widths = nn.Parameter(start)

    def bases(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """By variable, orthonormal rows `[k d]` and their shares `[k]`, with gradients."""
        rows = self._rows()
        if not self.boundless:
            return dict(
                zip(self.n_dims, ((part, None) for part in torch.split(rows, list(self.n_dims.values()))), strict=True)
            )
        place = torch.arange(self.d, device=rows.device, dtype=rows.dtype) + 0.5
        ends = self._ends() * self.d
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        shares = torch.sigmoid((ends[:, None] - place) / self.temperature)
        # Nothing lies below the first boundary.
        above = torch.sigmoid((place - starts[1:, None]) / self.temperature)
        shares = torch.cat([shares[:1], shares[1:] * above])
        return {name: (rows, share) for name, share in zip(self.n_dims, shares, strict=True)}

    def hard_bases(self) -> dict[str, Float[Tensor, "k d"]]:
        """By variable, the rows that are its own, detached; boundaries are rounded, and leave each at least one row."""
        rows = self._rows().detach()
        sizes = list(self.n_dims.values())
        if self.boundless:
            ends = (self._ends().detach() * self.d).round().int().tolist()
            ends = [max(end, number) for number, end in enumerate(ends, start=1)]
            for number in range(1, len(ends)):
                ends[number] = max(ends[number], ends[number - 1] + 1)
            ends = [min(end, self.d - (len(ends) - number)) for number, end in enumerate(ends, start=1)]
            sizes = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        parts = torch.split(rows[: sum(sizes)], sizes)
        return {name: part.clone() for name, part in zip(self.n_dims, parts, strict=True)}

    def _rows(self) -> Float[Tensor, "k d"]:
        rows: Any = self.rows.weight
        found: Tensor = rows
        return found

    def width_penalty(self) -> Tensor | float:
        """The share of all rows that variables take."""
        return 0.0 if self.widths is None else self._ends()[-1]

    def _ends(self) -> Float[Tensor, " variable"]:
        """The upper boundaries as shares of `d`, ascending, at most 1."""
        assert self.widths is not None
        ends = self.widths.clamp(min=_LEAST_WIDTH).cumsum(0)
        return ends / ends[-1].detach().clamp(min=1.0)
