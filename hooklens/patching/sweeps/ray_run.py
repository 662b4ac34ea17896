"""A sweep on workers of Ray: each makes the unpatched runs of a group of pairs, and runs the cells that it is given.

Groups and chunks are cut here, as the local engine cuts them, so what runs together is the same, and so are the
values; they are kept here, in the same order.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.metrics.group import MetricGroup
from hooklens.patching.pairs.loader import GroupSize, PairSource
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.runs.baseline import Baseline, run_baseline
from hooklens.patching.runs.options import RunOptions
from hooklens.patching.runs.sites import CellArray
from hooklens.patching.runs.unpatched import Source
from hooklens.patching.sweeps.chunks import Chunk, ChunkRunner, Measured
from hooklens.patching.sweeps.run import SweepRun
from hooklens.workers import RayWorkers, Work


@dataclass(frozen=True, eq=False, kw_only=True)
class _Group:
    """Some pairs, and how much runs at once."""

    prompts: PromptPairs
    chosen: list[int]
    limit: int


class SweepWork(Work):
    """What a worker holds: the model, the cells and the metrics; then a group's unpatched runs.

    Args:
        model: the model.
        array: the cells.
        metrics: what is measured.
        options: how it runs.
        source: what is put in.
    """

    def __init__(
        self, model: HookedCausalLM, array: CellArray, metrics: MetricGroup, options: RunOptions, source: Source
    ) -> None:
        self._model, self._array, self._metrics = model, array, metrics
        self._options = options
        self._source: Source = source
        self._runner: ChunkRunner | None = None

    @torch.no_grad()
    def begin(self, shared: _Group) -> None:
        """Make the unpatched runs of a group."""
        # Those of the group before are given up first.
        self._runner = None
        baseline = run_baseline(
            self._model,
            shared.prompts,
            shared.chosen,
            self._array.names,
            self._metrics,
            direction=self._options.direction,
            source=self._source,
            answers_only=True,
            edits=self._options.edits,
        )
        self._runner = ChunkRunner(
            model=self._model,
            array=self._array,
            baseline=baseline,
            limit=shared.limit,
            counts_tokens=self._options.batch_size == "auto",
        )

    @torch.no_grad()
    def run(self, task: Chunk) -> Measured:
        """Run some cells."""
        assert self._runner is not None
        measured = self._runner.run(task)
        # A view would take what it is a view of along.
        return replace(measured, values=[values.cpu().clone() for values in measured.values])


class RaySweepRun(SweepRun):
    """A sweep in progress whose cells run on workers of Ray; arguments as of `SweepRun`, and how many workers."""

    def __init__(
        self,
        model: HookedCausalLM,
        pairs: PairSource,
        array: CellArray,
        metrics: MetricGroup,
        options: RunOptions,
        source: Source,
        *,
        workers: int | None,
    ) -> None:
        super().__init__(model, pairs, array, metrics, options, source)
        self._n_asked = workers
        self._team: RayWorkers | None = None
        self._group: tuple[PromptPairs, list[int]] | None = None

    def _run(self) -> None:
        work = SweepWork(self.model, self.array, self.metrics, self.options, self.source)
        with RayWorkers(work, device=self.model.device, workers=self._n_asked, what="sweep") as self._team:
            super()._run()

    def _group_size(self) -> GroupSize | None:
        size = super()._group_size()
        if size is None:
            return None
        assert self._team is not None
        # Several processes may hold a group on this machine, which share what is free.
        n_holding = 1 + self._team.n_workers
        return lambda width: max(1, size(width) // n_holding)

    def _run_baseline(self, prompts: PromptPairs, chosen: list[int]) -> Baseline:
        self._group = prompts, chosen
        return super()._run_baseline(prompts, chosen)

    def _run_chunks(self, runner: ChunkRunner, chunks: Iterator[Chunk]) -> Iterator[Measured]:
        assert self._team is not None
        assert self._group is not None
        prompts, chosen = self._group
        for measured in self._team.run(chunks, shared=_Group(prompts=prompts, chosen=chosen, limit=runner.limit)):
            yield replace(measured, values=[values.to(self.model.device) for values in measured.values])
