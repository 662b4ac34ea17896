"""What `edge_attribution` gives: scores of edges, which can be checked against edges that are patched one by one."""

from dataclasses import dataclass, field

from hooklens.errors import HookLensError
from hooklens.patching.estimates.check import EstimateCheck
from hooklens.patching.estimates.estimate import Chosen, RunExactly
from hooklens.patching.results.edge_scores import EdgeScores


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class EdgeAttributionResult(EdgeScores):
    """Estimated scores of all edges.

    Attributes:
        checked: what the last `check` has found; None before the first.
        run_exactly: patches edges one by one, on the model and the prompts, which it holds; None where the scores are
            exact themselves, and in what a file held.
    """

    checked: EstimateCheck | None = field(default=None, init=False, compare=False)
    run_exactly: RunExactly | None = field(default=None, compare=False)

    def check(self, k: int | None = 20, *, sample: int = 20, seed: int = 0, progress: bool = True) -> EstimateCheck:
        """Patch some edges one by one, and see how far the scores can be trusted.

        The result is kept in `checked`, and the display of this value and its plots' titles tell it.

        Args:
            k: how many of the edges with the largest scores by magnitude to run; None: all there are.
            sample: how many of the others, drawn at random.
            seed: of the draw.
            progress: show a progress bar.

        Raises:
            InputError: no numbers of edges.
            HookLensError: the scores are exact, or were read from a file, which holds no model; or they are those of
                corrupted prompts with clean edges, of which exact runs are not made.
            SweepInterruptedError: it was stopped on the way.

        Warns:
            EstimateWarning: the correlation of estimated and exact scores is below 0.9.
        """
        if self.method == "exact":
            raise HookLensError("check: these scores are exact; there is nothing to compare them with")
        if self.run_exactly is None:
            raise HookLensError(
                "check: these scores were read from a file, which holds neither model nor prompts, so nothing can be "
                "run; estimate anew with patching.edge_attribution"
            )
        if self.direction != "noise":
            raise HookLensError(
                "check: exact runs are made of the clean prompts with one corrupted edge, and these scores are of "
                "direction='denoise'; exchange the prompts, and estimate with direction='noise'"
            )
        edges = self.exists.nonzero()
        estimated = self.scores[self.exists]
        chosen = Chosen.of(estimated, k, sample, seed)
        cells = [{"writer": self.writers[writer], "reader": self.readers[reader]} for writer, reader in edges.tolist()]
        how = f"{self.method}, rules {self.rules}"
        return chosen.keep(self, cells, self.run_exactly, method=how, progress=progress)

    def _heading(self) -> str:
        return super()._heading() if self.checked is None else f"{super()._heading()}<br>{self.checked.summary}"

    def _more_facts(self) -> dict[str, str]:
        known = "not checked: .check(k) patches the strongest edges one by one"
        if self.checked is not None:
            known = self.checked.summary
        elif self.method == "exact":
            known = "exact"
        return {"known": known}
