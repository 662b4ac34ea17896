"""A sweep in progress: which cells run together, and the values so far."""

from collections.abc import Iterator

import torch

from hooklens.causal_lm import HookedCausalLM
from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.group import MetricGroup
from hooklens.patching.pairs.loader import GroupSize, PairSource
from hooklens.patching.pairs.prompts import PromptPairs
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.results.several import Results
from hooklens.patching.runs.baseline import Baseline, run_baseline
from hooklens.patching.runs.memory import pairs_per_group, tokens_per_pass
from hooklens.patching.runs.options import RunOptions
from hooklens.patching.runs.sites import CellArray
from hooklens.patching.runs.tally import Tally
from hooklens.patching.runs.unpatched import Source
from hooklens.patching.sweeps.chunks import Chunk, ChunkRunner, Measured
from hooklens.patching.sweeps.plan import axes_of, plan_segments
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar


class SweepRun:
    """A sweep in progress: the cells still to run and the values so far.

    Args:
        model: the model.
        pairs: the pairs.
        array: the cells.
        metrics: what is measured.
        options: how it runs.
        source: what is put in.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        pairs: PairSource,
        array: CellArray,
        metrics: MetricGroup,
        options: RunOptions,
        source: Source,
    ) -> None:
        self.model, self.pairs, self.array, self.metrics = model, pairs, array, metrics
        self.options = options
        self.source: Source = source
        self.names = array.names
        self.tallies = [
            Tally(len(array.cells), pairs.n_pairs, dtype=wide_dtype(model.dtype), device=model.device)
            for _ in metrics.metrics
        ]
        self.forwards, self.token_layers, self.unchanged, self.unplanned = 0, 0, 0, 0

    @property
    def tally(self) -> Tally:
        """The values of the first metric: how far the sweep has come."""
        return self.tallies[0]

    def finish(self) -> SweepResult | Results[SweepResult]:
        """Run all cells of all pairs.

        Raises:
            SweepInterruptedError: stopped on the way.
        """
        return self.tally.finish("the sweep", self._run, self.result)

    def _run(self) -> None:
        with (
            torch.no_grad(),
            progress_bar("patching", total=self.tally.n_values, unit="value", progress=self.options.progress) as bar,
        ):
            for prompts, chosen in self.pairs.groups(self._group_size()):
                self.array.check_lengths(prompts.lengths, prompts.first)
                baseline = self._run_baseline(prompts, chosen)
                run_group = self._run_group if baseline.is_planned else self._run_unplanned
                for done in run_group(baseline):
                    bar.update(done)

    def result(self) -> SweepResult | Results[SweepResult]:
        """The values so far."""
        if self.metrics.is_single:
            return self._result_of(self.metrics.name, self.tally)
        return Results(
            {name: self._result_of(name, tally) for name, tally in zip(self.metrics.metrics, self.tallies, strict=True)}
        )

    def _result_of(self, name: str, tally: Tally) -> SweepResult:
        shape = [len(labels) for labels in self.array.axes.values()]
        n_cells, n_pairs = tally.n_cells, tally.n_pairs
        n_tokens = tally.n_tokens if self.pairs.n_pairs is None else sum(self.pairs.at_hand.lengths)
        stats = SweepStats(
            cells=n_cells,
            pairs=n_pairs,
            unchanged=self.unchanged,
            forwards=self.forwards,
            tokens=self.token_layers / self.model.cfg.n_layers,
            naive_forwards=(n_cells + 2) * n_pairs,
            naive_tokens=(n_cells + 2) * n_tokens,
            unplanned=self.unplanned,
        )
        clean, corrupted = tally.ends()
        return SweepResult(
            per_pair=tally.per_pair().view(*shape, -1),
            axes=self.array.axes,
            clean_per_pair=clean,
            corrupted_per_pair=corrupted,
            cells=tuple(cell.describe() for cell in self.array.cells),
            metric=name,
            direction=self.options.direction,
            stats=stats,
        )

    def _group_size(self) -> GroupSize | None:
        """How many pairs' unpatched runs are held at the same time; a function of logits needs all at once."""
        if self.metrics.needs_all_pairs:
            return None
        positions = self.metrics.n_positions

        def size(width: int) -> int:
            n_reads = width if positions is None else positions
            return pairs_per_group(self.model, width, self.names, n_reads)

        return size

    def _run_baseline(self, prompts: PromptPairs, chosen: list[int]) -> Baseline:
        baseline = run_baseline(
            self.model,
            prompts,
            chosen,
            self.names,
            self.metrics,
            direction=self.options.direction,
            source=self.source,
            answers_only=True,
            edits=self.options.edits,
        )
        self.forwards += self._n_unpatched(baseline)
        self.token_layers += 2 * len(chosen) * max(baseline.lengths) * self.model.cfg.n_layers
        for tally, ends in zip(self.tallies, baseline.ends, strict=True):
            tally.begin(*ends, baseline.lengths)
        return baseline

    def _run_group(self, baseline: Baseline) -> Iterator[int]:
        """Run all cells of a group of pairs; gives how many values each step has added."""
        segments = plan_segments(self.model, self.array.cells, baseline)
        n_cells, n_pairs = self.tally.n_cells, len(baseline.pairs)
        touched = {segment.cell for segment in segments}
        still = [cell for cell in range(n_cells) if cell not in touched]
        for tally, (clean, corrupted) in zip(self.tallies, baseline.ends, strict=True):
            base = corrupted if self.options.direction == "denoise" else clean
            tally.store(still, base.expand(len(still), -1))
        self.unchanged += n_cells * n_pairs - len(segments)
        yield len(still) * n_pairs

        runner = self._make_runner(baseline)
        for measured in self._run_chunks(runner, runner.split(segments)):
            yield self._keep(measured)

    def _run_unplanned(self, baseline: Baseline) -> Iterator[int]:
        """Run all cells of a group of pairs in full, each prompt by itself."""
        chunks = (Chunk(cells=[cell], segments=None) for cell in range(len(self.array.cells)))
        for measured in self._run_chunks(self._make_runner(baseline), chunks):
            self.unplanned += measured.forwards
            yield self._keep(measured)

    def _run_chunks(self, runner: ChunkRunner, chunks: Iterator[Chunk]) -> Iterator[Measured]:
        """What chunks of a group come to, in their order."""
        return map(runner.run, chunks)

    def _keep(self, measured: Measured) -> int:
        """Keep what was measured; gives how many values these are."""
        self.forwards += measured.forwards
        self.token_layers += measured.token_layers
        for metric, values in zip(self.metrics.metrics.values(), measured.values, strict=True):
            if bool(values.isnan().any()):
                cell = measured.cells[int(values.isnan().any(1).nonzero()[0])]
                raise MetricError(f"metric {metric.name} is NaN for the patch at {self.array.cells[cell]}")
        for tally, values in zip(self.tallies, measured.values, strict=True):
            tally.store(measured.cells, values)
        return measured.values[0].numel()

    def _n_unpatched(self, baseline: Baseline) -> int:
        """Passes that the unpatched runs took."""
        of_other = isinstance(self.source, HookedCausalLM)
        if baseline.is_planned:
            return 2 if of_other else 1
        return len(baseline.pairs) + (1 if of_other else len(baseline.pairs))

    def _make_runner(self, baseline: Baseline) -> ChunkRunner:
        return ChunkRunner(
            model=self.model,
            array=self.array,
            baseline=baseline,
            limit=self._limit(baseline),
            counts_tokens=self.options.batch_size == "auto",
        )

    def _limit(self, baseline: Baseline) -> int:
        if self.options.batch_size != "auto":
            return self.options.batch_size
        watches_pattern = any("key" in axes_of(name) for name in self.names)
        width = max(baseline.lengths)
        return tokens_per_pass(self.model, width, baseline.reads.shape[1], watches_pattern=watches_pattern)
