"""The values that an experiment has measured so far, group of pairs by group; and what is given when it stops.

An interrupt can come between any two steps. So what counts as measured is written in one step, behind which nothing
has to follow, and `finish_or_keep` is the one place where an experiment that stops gives what it has.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.patching.errors import SweepInterruptedError
from hooklens.patching.results.moments import Moments

Result = TypeVar("Result")
Cells = Sequence[int] | slice


def finish_or_keep(
    work: Callable[[], None],
    result: Callable[[], Result],
    *,
    has_begun: Callable[[], bool],
    stopped: Callable[[str, Result], Exception],
) -> Result:
    """Do all the work, and make a result of it; or of as much as was done.

    Until the work has begun, a failure is a mistake in the call, and goes on as it is.

    Args:
        work: measures, and keeps what it has measured.
        result: makes the result of that.
        has_begun: whether there is anything to keep.
        stopped: the error to raise, of why the work has stopped, and the result so far.
    """
    try:
        work()
        return result()
    except (Exception, KeyboardInterrupt) as error:
        if not has_begun():
            raise
        raise stopped(f"{type(error).__name__}: {error}", result()) from error


class _Group(NamedTuple):
    """Some pairs: where the values of all cells go, the unpatched runs' two, and how many tokens they have."""

    values: Float[Tensor, "cells pairs"] | None
    ends: Float[Tensor, "two pairs"]
    n_tokens: int


class Tally:
    """Values of cells, NaN where they have not been measured.

    Args:
        n_cells: how many cells there are.
        n_pairs: how many pairs there are; None: it is not known before the last one has come. Where it is known,
            memory for all values is taken once, and `per_pair` is that memory and no copy.
        dtype: of the values.
        device: where they are.
        absent: rows that are no cells; they hold 0 and do not count.
    """

    keeps_pairs = True

    def __init__(
        self,
        n_cells: int,
        n_pairs: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        absent: Bool[Tensor, " cells"] | None = None,
    ) -> None:
        self.n_cells, self._total, self._absent = n_cells, n_pairs, absent
        self._empty = torch.empty(0, dtype=dtype, device=device)
        self._groups: list[_Group] = []
        self._whole = self._make_values(n_pairs) if n_pairs is not None and self.keeps_pairs else None

    @property
    def has_begun(self) -> bool:
        """Whether a group's unpatched runs were measured."""
        return bool(self._groups)

    @property
    def n_pairs(self) -> int:
        """How many pairs there are, as far as it is known."""
        return self._n_begun if self._total is None else self._total

    @property
    def n_tokens(self) -> int:
        """Tokens of the pairs that were begun."""
        return sum(group.n_tokens for group in self._groups)

    @property
    def n_values(self) -> int | None:
        """How many values there will be, where it is known."""
        return None if self._total is None else self._n_present * self._total

    @property
    def n_measured(self) -> int:
        """How many values there are."""
        n_known = sum(int((~group.values.isnan()).sum()) for group in self._groups if group.values is not None)
        return n_known - (self.n_cells - self._n_present) * self._n_begun

    def begin(self, clean: Float[Tensor, " pairs"], corrupted: Float[Tensor, " pairs"], lengths: Sequence[int]) -> None:
        """Take up the next pairs, of which the unpatched runs are measured."""
        first, n_now = self._n_begun, len(clean)
        values: Tensor | None = None
        if self._whole is not None:
            values = self._whole[:, first : first + n_now]
        elif self.keeps_pairs:
            values = self._make_values(n_now)
        self._groups.append(_Group(values, torch.stack([clean, corrupted]).to(self._empty), sum(lengths)))

    def store(self, cells: Cells, values: Float[Tensor, "cells pairs"]) -> None:
        """Write values of the pairs taken up last."""
        into = self._groups[-1].values
        assert into is not None
        into[cells if isinstance(cells, slice) else list(cells)] = values.to(self._empty)

    def per_pair(self) -> Float[Tensor, "cells pairs"]:
        """The values so far."""
        if self._whole is not None:
            return self._whole
        parts = [group.values for group in self._groups if group.values is not None]
        return torch.cat([self._make_values(0), *parts], dim=1)

    def ends(self) -> Float[Tensor, "two pairs"]:
        """The metric of the clean and the corrupted run."""
        waiting = self._empty.new_full((2, self.n_pairs - self._n_begun), torch.nan)
        return torch.cat([*(group.ends for group in self._groups), waiting], dim=1)

    def finish(self, what: str, work: Callable[[], None], result: Callable[[], Result]) -> Result:
        """Do all the work, and make a result of it; or of as much as was done.

        Args:
            what: what an error calls the experiment.
            work: measures, and stores here.
            result: makes the result of the values so far.

        Raises:
            SweepInterruptedError: the work was stopped, or failed; it holds the result so far. What fails before the
                first pairs are taken up goes on as it is.
        """

        def stopped(why: str, partial: Result) -> Exception:
            of_all = "" if self.n_values is None else f" of {self.n_values}"
            return SweepInterruptedError(
                f"{what} stopped after {self.n_measured}{of_all} values ({why}); they are in this error's .result, the "
                "others are NaN",
                partial,
            )

        return finish_or_keep(work, result, has_begun=lambda: self.has_begun, stopped=stopped)

    @property
    def _n_begun(self) -> int:
        return sum(group.ends.shape[1] for group in self._groups)

    @property
    def _n_present(self) -> int:
        return self.n_cells if self._absent is None else self.n_cells - int(self._absent.sum())

    def _make_values(self, n_pairs: int) -> Float[Tensor, "cells pairs"]:
        values = self._empty.new_full((self.n_cells, n_pairs), torch.nan)
        if self._absent is not None:
            values[self._absent] = 0.0
        return values


class SumTally(Tally):
    """A tally that adds pairs up in `moments`, so that memory does not grow with their number."""

    keeps_pairs = False

    def __init__(
        self,
        n_cells: int,
        n_pairs: int | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        absent: Bool[Tensor, " cells"] | None = None,
    ) -> None:
        super().__init__(n_cells, n_pairs, dtype=dtype, device=device, absent=absent)
        self.moments = Moments.none(n_cells, device=device)

    @property
    def n_measured(self) -> int:
        """How many values were added up."""
        counts = self.moments.n if self._absent is None else self.moments.n[~self._absent]
        return int(counts.sum())

    def store(self, cells: Cells, values: Float[Tensor, "cells pairs"]) -> None:
        """Add values of the pairs taken up last."""
        self.moments = self.moments.add(cells, values)
