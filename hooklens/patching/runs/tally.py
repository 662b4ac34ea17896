"""The values that an experiment has measured so far, group of pairs by group."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.patching.errors import SweepInterruptedError
from hooklens.patching.results.result import SweepResult

Result = TypeVar("Result", bound=SweepResult)


class _Group(NamedTuple):
    """Some pairs: the values of all cells, the unpatched runs' `[clean corrupted]`, and how many tokens they have."""

    values: Float[Tensor, "cells pairs"]
    ends: Float[Tensor, "two pairs"]
    n_tokens: int


class Tally:
    """Values of cells, NaN where they have not been measured.

    Args:
        n_cells: how many cells there are.
        n_pairs: how many pairs there are; None: it is not known before the last one has come.
        dtype: of the values.
        device: where they are.
    """

    def __init__(self, n_cells: int, n_pairs: int | None, *, dtype: torch.dtype, device: torch.device) -> None:
        self.n_cells, self._total = n_cells, n_pairs
        self._empty = torch.empty(0, dtype=dtype, device=device)
        self._groups: list[_Group] = []

    @property
    def has_begun(self) -> bool:
        """Whether a group's unpatched runs were measured."""
        return bool(self._groups)

    @property
    def n_pairs(self) -> int:
        """How many pairs there are, as far as it is known."""
        return sum(group.ends.shape[1] for group in self._groups) if self._total is None else self._total

    @property
    def n_tokens(self) -> int:
        """Tokens of the pairs that were begun."""
        return sum(group.n_tokens for group in self._groups)

    @property
    def n_values(self) -> int | None:
        """How many values there will be, where it is known."""
        return None if self._total is None else self.n_cells * self._total

    def begin(self, clean: Float[Tensor, " pairs"], corrupted: Float[Tensor, " pairs"], lengths: Sequence[int]) -> None:
        """Take up the next pairs, of which the unpatched runs are measured."""
        ends = torch.stack([clean, corrupted]).to(self._empty)
        values = self._empty.new_full((self.n_cells, len(clean)), torch.nan)
        self._groups.append(_Group(values, ends, sum(lengths)))

    def store(self, cells: Sequence[int], values: Float[Tensor, "cells pairs"]) -> None:
        """Write values of the pairs taken up last."""
        self._groups[-1].values[list(cells)] = values.to(self._empty)

    def per_pair(self) -> Float[Tensor, "cells pairs"]:
        """The values so far."""
        return self._side_by_side([group.values for group in self._groups], self.n_cells)

    def ends(self) -> Float[Tensor, "two pairs"]:
        """The metric of the clean and the corrupted run."""
        return self._side_by_side([group.ends for group in self._groups], 2)

    def finish(self, what: str, work: Callable[[], None], result: Callable[[], Result]) -> Result:
        """Do all the work, and make a result of it; or of as much as was done.

        Until the first unpatched runs are measured, a failure is a mistake in the call, and goes on as it is.

        Args:
            what: what an error calls the experiment.
            work: measures, and stores here.
            result: makes the result of the values so far.

        Raises:
            SweepInterruptedError: the work was stopped, or failed; it holds the result so far.
        """
        try:
            work()
            return result()
        except (Exception, KeyboardInterrupt) as error:
            if not self.has_begun:
                raise
            n_measured = sum(int((~group.values.isnan()).sum()) for group in self._groups)
            of_all = "" if self.n_values is None else f" of {self.n_values}"
            raise SweepInterruptedError(
                f"{what} stopped after {n_measured}{of_all} values ({type(error).__name__}: {error}); they are in this "
                "error's .result, the others are NaN",
                result(),
            ) from error

    def _side_by_side(self, parts: list[Tensor], n_rows: int) -> Tensor:
        waiting = self.n_pairs - sum(part.shape[1] for part in parts)
        return torch.cat([*parts, self._empty.new_full((n_rows, waiting), torch.nan)], dim=1)
