r"""How far an estimate can be trusted: some of its cells, run exactly.

A check runs the `k` cells with the largest estimated effects, and `sample` of the others, drawn at random. From these
it tells of all cells:

- the Pearson correlation of estimated and exact effects. The top cells count once each and each drawn cell for as many
  of the others as it stands for (a stratified sample; Cochran 1977, "Sampling Techniques", chapter 5), so this is the
  correlation over the whole table, up to sampling; exactly that where every cell was run;
- the share of cells whose sign is right, weighted alike;
- a bound on what was missed. Were more than `j` of the `N` cells that are not in the top to have an effect above the
  largest in a sample of `m`, the sample would have seen none of them with a probability of at most
  `C(N - j, m) / C(N, m)`; the bound gives the least `j` for which this is at most `1 - confidence`.

Effects are changes of the metric, averaged over pairs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_int, show
from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import InputError
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

TRUSTED = 0.9
"""The correlation below which a check warns."""

_SHOWN = 100
# Of two effects this much smaller than the largest, the sign is noise.
_SMALL = 0.01


class EstimateWarning(UserWarning):
    """A check found an estimate that says little about what patches do."""


class Bound(NamedTuple):
    """What can be said of the cells that were not run.

    Attributes:
        effect: the largest exact effect, by magnitude, among the cells drawn at random.
        error: the largest error of the estimate among them.
        n_cells: at most so many of the other cells have an effect above `effect`; and at most so many are estimated
            with an error above `error`.
        confidence: the probability of each of the two statements.
    """

    effect: float
    error: float
    n_cells: int
    confidence: float


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EstimateCheck(Displayed):
    """Estimated and exact effects of some cells.

    Attributes:
        cells: what was run, the top cells first.
        estimated, exact: their effects, averaged over pairs.
        is_top: which are there for their estimate; the others were drawn at random.
        n_cells: how many cells the estimate has.
        method: how the effects were estimated.
    """

    cells: tuple[dict[str, Any], ...]
    estimated: Float[Tensor, " cell"]
    exact: Float[Tensor, " cell"]
    is_top: Bool[Tensor, " cell"]
    n_cells: int
    method: str

    @property
    def weights(self) -> Float[Tensor, " cell"]:
        """How many cells each stands for."""
        n_drawn = int((~self.is_top).sum())
        each = (self.n_cells - int(self.is_top.sum())) / n_drawn if n_drawn else 0.0
        return torch.where(self.is_top, 1.0, each).double()

    @property
    def pearson(self) -> float:
        """The correlation of estimated and exact effects over all cells; NaN where either is the same everywhere."""
        weights = self.weights / self.weights.sum()
        x, y = (values.double() - (weights * values.double()).sum() for values in (self.estimated, self.exact))
        products = [float((weights * a * b).sum()) for a, b in ((x, y), (x, x), (y, y))]
        scale = math.sqrt(products[1] * products[2])
        return products[0] / scale if scale > 0 else math.nan

    @property
    def sign_agreement(self) -> float:
        """The share of cells with the right sign; NaN where none has an effect.

        Cells whose estimated and exact effect are both below a hundredth of the largest exact one do not count.
        """
        counts = self._counts()
        weights = self.weights[counts]
        right = self.estimated[counts].sign() == self.exact[counts].sign()
        return float(weights[right].sum() / weights.sum()) if len(weights) else math.nan

    @property
    def sign_errors(self) -> "pandas.DataFrame":
        """The cells that were run and have the wrong sign, those with the largest exact effect first."""
        table = self.to_dataframe()
        wrong = (self._counts() & (self.estimated.sign() != self.exact.sign())).tolist()
        found: pandas.DataFrame = table[wrong].sort_values("exact", key=abs, ascending=False).reset_index(drop=True)
        return found

    def bound(self, confidence: float = 0.95) -> Bound:
        """What can be said of the cells that were not run.

        Raises:
            InputError: the confidence is not between 0 and 1.
        """
        if not isinstance(confidence, float) or not 0 < confidence < 1:
            raise InputError(f"bound: confidence is {show(confidence)}; expected a number between 0 and 1")
        drawn = ~self.is_top
        n_others, n_drawn = self.n_cells - int(self.is_top.sum()), int(drawn.sum())
        n_unseen = n_others - n_drawn
        chance = math.log1p(-confidence)
        missed = next((j for j in range(n_unseen) if _log_chance_to_miss(n_others, n_drawn, j + 1) <= chance), n_unseen)
        if n_drawn == 0:
            return Bound(0.0, 0.0, n_unseen, confidence)
        error = (self.estimated - self.exact)[drawn].abs().max()
        return Bound(float(self.exact[drawn].abs().max()), float(error), missed, confidence)

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per cell that was run: what it is, its estimated and exact effect, and whether it is a top cell."""
        table: pandas.DataFrame = import_package("pandas").DataFrame(list(self.cells))
        table = table.drop(columns=[column for column in table.columns if table[column].isna().all()])
        table["estimated"], table["exact"] = self.estimated.tolist(), self.exact.tolist()
        table["top"] = self.is_top.tolist()
        return table

    @property
    def summary(self) -> str:
        """One line: what was run, and what it says."""
        n_top, n_run = int(self.is_top.sum()), len(self.cells)
        ran = "all" if n_run == self.n_cells else f"{n_top} top and {n_run - n_top} random of"
        text = (
            f"checked on {ran} {self.n_cells} cells: Pearson {self.pearson:.3f}, signs {self.sign_agreement:.0%} right"
        )
        if n_run < self.n_cells:
            bound = self.bound()
            text += f"; at most {bound.n_cells} others above {bound.effect:.3g} ({bound.confidence:.0%} confidence)"
        return text

    def _summary(self) -> Summary:
        order = self.exact.abs().nan_to_num(-1.0).argsort(descending=True, stable=True)[:_SHOWN].tolist()
        named = [
            key
            for key in (self.cells[0] if self.cells else ())
            if any(cell.get(key) is not None for cell in self.cells)
        ]
        rows = [
            (
                *("" if self.cells[row].get(key) is None else str(self.cells[row][key]) for key in named),
                float(self.estimated[row]),
                float(self.exact[row]),
                "top" if self.is_top[row] else "random",
            )
            for row in order
        ]
        return Summary(
            title=f"EstimateCheck of {self.method}",
            facts={"found": self.summary},
            listing=Listing(
                columns=(*named, "estimated", "exact", "why"),
                rows=rows,
                what="cells",
                caption="cells with the largest exact effects",
                n_rows=len(self.cells),
            ),
        )

    def _counts(self) -> Bool[Tensor, " cell"]:
        """The cells whose sign means something."""
        if not len(self.cells):
            return torch.zeros(0, dtype=torch.bool)
        least = _SMALL * self.exact.abs().max()
        larger = torch.maximum(self.estimated.abs(), self.exact.abs())
        return (larger >= least) & (larger > 0)


def choose_cells(
    strengths: Float[Tensor, " cell"], k: int | None, sample: int, seed: int, *, what: str
) -> tuple[list[int], list[int]]:
    """The cells of a check: the `k` strongest (None: all), and some of the others, drawn without replacement.

    Raises:
        InputError: no numbers of cells.
    """
    if k is not None:
        read_int(k, what=f"{what}: k", least=0)
    read_int(sample, what=f"{what}: sample", least=0)
    read_int(seed, what=f"{what}: seed", least=0)
    order = strengths.abs().nan_to_num(0.0).argsort(descending=True, stable=True).tolist()
    top = order if k is None else order[:k]
    others = order[len(top) :]
    if not others:
        return top, []
    if len(top) + sample < 2:
        raise InputError(f"{what}: k={k} and sample={sample} leave fewer than two cells to compare; raise one of them")
    drawn = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:sample].tolist()
    return top, [others[place] for place in sorted(drawn)]


def _log_chance_to_miss(n: int, drawn: int, j: int) -> float:
    """The logarithm of the chance that a sample holds none of `j` cells among `n`."""
    if n - j < drawn:
        return -math.inf
    return _log_choose(n - j, drawn) - _log_choose(n, drawn)


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def make_check(
    chosen: tuple[list[int], list[int]],
    cells: Sequence[dict[str, Any]],
    estimated: Float[Tensor, " cell"],
    exact: Float[Tensor, " run"],
    *,
    method: str,
) -> EstimateCheck:
    """A check of what was run.

    Args:
        chosen: the top cells, and those drawn.
        cells: all cells.
        estimated: the estimated effects of all of them.
        exact: the exact effects of the chosen ones, in their order.
        method: how the effects were estimated.
    """
    top, drawn = chosen
    order = [*top, *drawn]
    return EstimateCheck(
        cells=tuple(cells[index] for index in order),
        estimated=estimated[order].detach().cpu(),
        exact=exact.detach().cpu(),
        is_top=torch.tensor([True] * len(top) + [False] * len(drawn)),
        n_cells=len(cells),
        method=method,
    )
