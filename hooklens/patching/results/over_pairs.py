"""The statistics that every result gives, of whatever it has measured for each pair."""

from collections.abc import Callable, Sequence
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_one_of
from hooklens.display import Displayed
from hooklens.errors import HookLensError
from hooklens.patching.results.statistics import (
    Alternative,
    Interval,
    Method,
    bootstrap_interval,
    permutation_p_value,
    standard_error,
)

Statistic = Literal["standard_error", "bootstrap", "permutation_test"]
STATISTICS: tuple[Statistic, ...] = ("standard_error", "bootstrap", "permutation_test")

Mark = Literal["bootstrap", "permutation_test"]
Compute = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From values `[*cells pair]` and what they are compared with `[pair]` to statistics `[*cells]`."""

LEVEL = 0.05
"""Marks are of this level, 1 in 20."""


class OverPairs(Displayed):
    """A result whose values are means over pairs.

    Each kind of result says in `_over_pairs` what it holds for each pair, and what a value is compared with: a patch
    with none, a circuit with the whole network, an edge's score with 0.
    """

    def _over_pairs(self, compute: Compute) -> tuple[Tensor, ...]:
        """A statistic of each value."""
        raise NotImplementedError

    @property
    def standard_errors(self) -> Float[Tensor, "*axes"]:
        """The standard error of each value: the standard deviation over pairs over the root of their number.

        Raises:
            HookLensError: fewer than two pairs.
        """
        [errors] = self._over_pairs(lambda values, base: (standard_error(values),))
        return errors

    def bootstrap(
        self, *, confidence: float = 0.95, n_resamples: int = 9999, method: Method = "BCa", seed: int = 0
    ) -> Interval:
        """Bootstrap intervals of the values, `low` and `high` `[*axes]`; see `bootstrap_interval` for the arguments.

        Raises:
            HookLensError: fewer than two pairs.
            MissingDependencyError: scipy, the extra `stats`, is not installed.
        """

        def compute(values: Tensor, base: Tensor) -> tuple[Tensor, ...]:
            return bootstrap_interval(values, confidence=confidence, n_resamples=n_resamples, method=method, seed=seed)

        return Interval(*self._over_pairs(compute))

    def permutation_test(
        self, *, n_resamples: int = 9999, alternative: Alternative = "two-sided", seed: int = 0
    ) -> Float[Tensor, "*axes"]:
        """p-values of "it makes no difference", over pairs; see `permutation_p_value` for the arguments.

        No difference is that of a patch to the run without one, of a circuit to the whole network, and of an edge's
        score to 0. p-values are of each cell by itself: of 1,000 cells without an effect about 50 have one below 0.05.

        Raises:
            HookLensError: fewer than two pairs.
            MissingDependencyError: scipy, the extra `stats`, is not installed.
        """

        def compute(values: Tensor, base: Tensor) -> tuple[Tensor, ...]:
            return (permutation_p_value(values, base, n_resamples=n_resamples, alternative=alternative, seed=seed),)

        [p_values] = self._over_pairs(compute)
        return p_values

    def _read_statistics(self, statistics: Sequence[Statistic]) -> list[Statistic]:
        """What a table is asked for.

        Raises:
            HookLensError: an unknown statistic.
        """
        given = [statistics] if isinstance(statistics, str) else list(statistics)
        return [read_one_of(name, what="statistics", options=STATISTICS, error=HookLensError) for name in given]

    def _columns_of(self, statistics: Sequence[Statistic]) -> dict[str, Tensor]:
        """The statistics that are asked for, by the names that they have in a table."""
        asked = self._read_statistics(statistics)
        columns = {}
        if "standard_error" in asked:
            columns["standard_error"] = self.standard_errors
        if "bootstrap" in asked:
            columns["low"], columns["high"] = self.bootstrap()
        if "permutation_test" in asked:
            columns["p_value"] = self.permutation_test()
        return columns

    def _find_unclear(self, mark: Mark) -> Bool[Tensor, "*axes"]:
        """The values that cannot be told from what they are compared with.

        Raises:
            HookLensError: an unknown mark, or fewer than two pairs.
        """
        read_one_of(mark, what="plot: mark", options=STATISTICS[1:], error=HookLensError)
        if mark == "permutation_test":
            return self.permutation_test() > LEVEL

        def compute(values: Tensor, base: Tensor) -> tuple[Tensor, ...]:
            return bootstrap_interval(values - base, confidence=1 - LEVEL)

        low, high = self._over_pairs(compute)
        return (low <= 0) & (high >= 0)
