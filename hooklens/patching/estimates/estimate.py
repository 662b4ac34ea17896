"""What `attribution` gives: estimated values of a sweep's cells, which can be checked against exact ones."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from hooklens.errors import HookLensError
from hooklens.patching.estimates.check import TRUSTED, EstimateCheck, EstimateWarning, choose_cells, make_check
from hooklens.patching.results.file import TEXT, ResultFile
from hooklens.patching.results.result import RESULT_FILE, SweepResult, read_fields


@runtime_checkable
class RunExactly(Protocol):
    """An experiment that can run cells exactly."""

    def __call__(self, chosen: Sequence[int], *, progress: bool) -> Float[Tensor, " run"]:
        """The exact effects of some cells, by their number, averaged over pairs."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class AttributionResult(SweepResult):
    """Estimated values of a metric on a grid of patches.

    Attributes:
        method: where gradients were taken: `"atp"` or `"ig"`.
        rules: the named set of gradient rules, or the rules themselves.
        checked: what the last `check` has found; None before the first.
        run_exactly: runs cells exactly, on the model and the prompts, which it holds; None in what a file held.
    """

    method: str
    rules: str
    checked: EstimateCheck | None = field(default=None, init=False, compare=False)
    run_exactly: RunExactly | None = field(default=None, compare=False)

    @property
    def effects(self) -> Float[Tensor, "*axes"]:
        """What each patch changes the metric by, averaged over pairs."""
        return self.values - self.base_per_pair.mean()

    def check(self, k: int | None = 20, *, sample: int = 20, seed: int = 0, progress: bool = True) -> EstimateCheck:
        """Run some cells exactly, and see how far the estimate can be trusted.

        The result is kept: the display of this value, its plots' titles and `checked` tell it.

        Args:
            k: how many of the cells with the largest estimated effects to run; None: all cells there are.
            sample: how many of the others, drawn at random.
            seed: of the draw.
            progress: show a progress bar.

        Raises:
            InputError: no numbers of cells.
            HookLensError: this was read from a file, which holds no model.
            SweepInterruptedError: it was stopped on the way.

        Warns:
            EstimateWarning: the estimate's correlation with the exact effects is below 0.9.
        """
        if self.run_exactly is None:
            raise HookLensError(
                "this estimate was read from a file, which holds neither model nor prompts, so nothing can be run; "
                "estimate anew with patching.attribution, or run the cells with patching.sweep"
            )
        chosen = Chosen.of(self.effects.flatten(), k, sample, seed)
        return chosen.keep(self, self.cells, self.run_exactly, method=self._how, progress=progress)

    @property
    def _how(self) -> str:
        return f"{self.method}, rules {self.rules}"

    def _heading(self) -> str:
        heading = f"{super()._heading()} (estimated: {self._how})"
        return heading if self.checked is None else f"{heading}<br>{self.checked.summary}"

    @property
    def _checked_line(self) -> str:
        return (
            "not checked: .check(k) runs the strongest cells exactly" if self.checked is None else self.checked.summary
        )

    def _more_facts(self) -> dict[str, str]:
        return {"estimated": f"by {self._how}", "known": self._checked_line}

    def save(self, path: str | Path) -> None:
        """Write the estimate to a safetensors file, whole or not at all; without what a check has found.

        Raises:
            CheckpointError: the file cannot be written.
        """
        tensors, described = self._parts()
        _FILE.write(path, tensors, {**described, "method": self.method, "rules": self.rules})

    @classmethod
    def load(cls, path: str | Path) -> "AttributionResult":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or no estimate.
        """
        return cls(**read_fields(_FILE, path))


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a check runs.

    Attributes:
        estimated: the estimated effects of all cells.
        places: the top cells, and those drawn from the others.
    """

    estimated: Float[Tensor, " cell"]
    places: tuple[list[int], list[int]]

    @classmethod
    def of(cls, estimated: Float[Tensor, " cell"], k: int | None, sample: int, seed: int) -> "Chosen":
        """The `k` strongest cells (None: all), and a sample of the others.

        Raises:
            InputError: no numbers of cells.
        """
        return cls(estimated, choose_cells(estimated, k, sample, seed, what="check"))

    def keep(
        self,
        owner: object,
        cells: Sequence[dict[str, Any]],
        run_exactly: RunExactly,
        *,
        method: str,
        progress: bool,
        instead: str = "other rules (rules=...), method='ig', or patching.sweep",
    ) -> EstimateCheck:
        """Run the cells exactly, and set `checked` of the estimate to what that says.

        Args:
            owner: the estimate.
            cells: all its cells.
            run_exactly: runs some of them.
            method: how the effects were estimated.
            progress: show a progress bar.
            instead: what to try where the estimate is poor.

        Warns:
            EstimateWarning: the correlation is below 0.9, or there is none.
        """
        exact = run_exactly([*self.places[0], *self.places[1]], progress=progress)
        found = make_check(self.places, cells, self.estimated, exact, method=method)
        # What is known of a value is no part of it: the estimate stays the same.
        object.__setattr__(owner, "checked", found)
        _warn_if_poor(found, instead)
        return found


def _warn_if_poor(check: EstimateCheck, instead: str) -> None:
    """Warn of an estimate that does not go with what patches do.

    Args:
        check: what was found.
        instead: what to try.

    Warns:
        EstimateWarning: the correlation is below 0.9, or there is none.
    """
    has_effects = bool((check.exact != 0).any() or (check.estimated != 0).any())
    if has_effects and not check.pearson >= TRUSTED:
        warnings.warn(
            f"the estimate ({check.method}) has a correlation of {check.pearson:.2f} with exact patches, below "
            f"{TRUSTED}: {check.summary}. Try {instead}",
            EstimateWarning,
            stacklevel=4,
        )


_FILE = ResultFile(
    format="hooklens.patching.attribution-1",
    contents="an attribution",
    writer="AttributionResult.save",
    keys={**RESULT_FILE.keys, "method": TEXT, "rules": TEXT},
)
