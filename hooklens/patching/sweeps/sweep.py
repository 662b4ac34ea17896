"""The sweep: activation patching over a grid of sites.

Activation patching (Meng et al. 2022, "Locating and Editing Factual Associations in GPT"; Wang et al. 2022;
Heimersheim and Nanda 2024, "How to use and interpret activation patching") runs a model on one prompt and
replaces one activation by its value on another prompt:

    value(cell) = metric( model(into) with activation(cell) := activation(cell) in the other run )

With `direction="denoise"` a clean activation goes into the corrupted run, and a high value says that the site
carries enough to restore the behaviour; with `"noise"` it is the other way round, and a low value says that the
behaviour needs the site.

What is run is planned, and every shortcut gives what one full forward per cell would, up to rounding:

- cells are rows of a batch, each with its own patch;
- a row enters at the layer that it is patched in, with the unpatched run's stream (`passes`);
- only positions from the first one that the patch changes are run, on the unpatched run's keys and values, and
  rows of few positions share a row of the batch (`packing`);
- positions past the last one that the metric reads are not run, and only those it reads are unembedded;
- a patch that puts in what was there already is not run at all.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching.errors import MetricError, SiteError
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import Prompt, PromptPairs, read_pairs
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.runs.baseline import Baseline, Direction, Source, refuse_nan, run_baseline
from hooklens.patching.runs.checks import check_model, check_source
from hooklens.patching.runs.memory import BatchSize, check_batch_size, pairs_per_group, tokens_per_pass
from hooklens.patching.runs.progress import keep_partial_result
from hooklens.patching.runs.sites import CellArray, Sites, lay_out
from hooklens.patching.sweeps.packing import Segment
from hooklens.patching.sweeps.passes import Pass
from hooklens.patching.sweeps.plan import axes_of, can_share, plan_segments
from hooklens.precision import wide_dtype


def sweep(
    model: HookedCausalLM,
    clean: Prompt,
    corrupted: Prompt,
    sites: Sites,
    metric: Metric | MetricFunction,
    *,
    batch_size: BatchSize = "auto",
    direction: Direction = "denoise",
    source: Source = "other",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> SweepResult:
    """Patch every cell of a grid and measure what it does.

    Args:
        model: the model; nothing may be attached to its hook points.
        clean: prompts whose behaviour is studied: text, a list of texts, or token ids.
        corrupted: as many prompts of the same lengths.
        sites: a hook word (`"resid_pre"`), a `patching.grid(...)`, or a list of these.
        metric: a value such as `patching.LogitDiff(answer, wrong)`, or a function from logits
            `[batch pos d_vocab]` to `[batch]`, see `FunctionMetric`.
        batch_size: patched prompts per pass; `"auto"` by memory.
        direction: `"denoise"` patches the corrupted run, `"noise"` the clean one.
        source: what is put in: the `"other"` run's activation, `"zero"`, or tensors by hook name that broadcast
            to `[pairs pos ...]`: means over a data set, or the activations of a resampled example.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: prompts that do not go together, or hooks attached to the model.
        HookNameError, SiteError: a site, layer, position or head that is not there.
        TransformError: a source that is the cache of a model with other processing.
        MetricError: the metric gives another shape than one value per row, or NaN for an unpatched run.
        SweepInterruptedError: the sweep was stopped, or failed on the way; it holds what was measured.

    Example:
        >>> result = patching.sweep(model, clean, corrupted, "resid_pre", patching.LogitDiff(" Mary", " John"))
        >>> result.top(5)
    """
    check_model(model, allow_training=allow_training)
    _check_options(batch_size, direction, source)
    check_source(model, source)
    prompts = read_pairs(model, clean, corrupted, attention_mask)
    array = lay_out(sites, model, prompts.lengths)
    with torch.no_grad():
        run = SweepRun(
            model, prompts, array, as_metric(metric), batch_size=batch_size, direction=direction, source=source
        )
        return run.finish(progress=progress)


class SweepRun:
    """A sweep in progress: the cells still to run and the values so far.

    Args:
        model: the model.
        prompts: the pairs.
        array: the cells.
        metric: what is measured.
        batch_size: patched prompts per pass, or `"auto"`.
        direction: which run is patched.
        source: what is put in.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        array: CellArray,
        metric: Metric,
        *,
        batch_size: BatchSize,
        direction: Direction,
        source: Source,
    ) -> None:
        self.model, self.prompts, self.array, self.metric = model, prompts, array, metric
        self.batch_size, self.direction, self.source = batch_size, direction, source
        n_cells, n_pairs = len(array.cells), len(prompts)
        self.names = list(dict.fromkeys(cell.name for cell in array.cells))
        dtype = wide_dtype(model.dtype)
        self.values = torch.full((n_cells, n_pairs), torch.nan, dtype=dtype, device=model.device)
        self.ends = torch.full((2, n_pairs), torch.nan, dtype=dtype, device=model.device)
        self.forwards, self.token_layers, self.unchanged = 0, 0, 0

    def finish(self, *, progress: bool) -> SweepResult:
        """Run all cells of all pairs.

        Raises:
            SweepInterruptedError: stopped on the way.
        """
        groups = list(self._groups())
        first = self._run_baseline(groups[0])
        with keep_partial_result("the sweep", "patching", self.values, self.result, progress=progress) as bar:
            for number, group in enumerate(groups):
                baseline = first if number == 0 else self._run_baseline(group)
                for done in self._run_group(baseline):
                    bar.update(done)
        return self.result()

    def result(self) -> SweepResult:
        """The values so far."""
        shape = [len(labels) for labels in self.array.axes.values()]
        n_tokens = sum(self.prompts.lengths)
        stats = SweepStats(
            cells=len(self.values),
            pairs=len(self.prompts),
            unchanged=self.unchanged,
            forwards=self.forwards,
            tokens=self.token_layers / self.model.cfg.n_layers,
            naive_forwards=self.values.numel() + 2 * len(self.prompts),
            naive_tokens=(len(self.values) + 2) * n_tokens,
        )
        return SweepResult(
            per_pair=self.values.view(*shape, -1).clone(),
            axes=self.array.axes,
            clean_per_pair=self.ends[0].clone(),
            corrupted_per_pair=self.ends[1].clone(),
            cells=tuple(cell.describe() for cell in self.array.cells),
            metric=self.metric.name,
            direction=self.direction,
            stats=stats,
        )

    def _groups(self) -> Iterator[list[int]]:
        """Pairs whose unpatched runs are held at the same time; a function of logits needs all pairs at once."""
        n_pairs = len(self.prompts)
        size = n_pairs
        if not self.metric.needs_all_pairs:
            size = pairs_per_group(self.model, max(self.prompts.lengths), self.names, self._n_reads())
        for first in range(0, n_pairs, size):
            yield list(range(first, min(first + size, n_pairs)))

    def _n_reads(self) -> int:
        positions = self.metric.positions
        return max(self.prompts.lengths) if positions is None else len(positions)

    def _run_baseline(self, group: list[int]) -> Baseline:
        baseline = run_baseline(
            self.model,
            self.prompts,
            group,
            self.names,
            self.metric,
            direction=self.direction,
            source=self.source,
        )
        self.forwards += 1
        self.token_layers += 2 * len(group) * max(baseline.lengths) * self.model.cfg.n_layers
        self.ends[:, group] = torch.stack([baseline.clean, baseline.corrupted]).to(self.ends)
        refuse_nan(baseline)
        return baseline

    def _run_group(self, baseline: Baseline) -> Iterator[int]:
        """Run all cells of a group of pairs; gives how many values each step has added."""
        segments = plan_segments(self.model, self.array.cells, baseline)
        pairs = list(baseline.pairs)
        ends = (baseline.clean, baseline.corrupted)
        base = ends[1] if self.direction == "denoise" else ends[0]
        touched = {segment.cell for segment in segments}
        still = [cell for cell in range(len(self.values)) if cell not in touched]
        self._store(still, pairs, base.to(self.values).expand(len(still), -1))
        self.unchanged += len(self.values) * len(pairs) - len(segments)
        yield len(still) * len(pairs)

        for chunk in self._chunks(segments, baseline):
            cells = list(dict.fromkeys(segment.cell for segment in chunk))
            logits = self._run_chunk(chunk, cells, baseline)
            measured = baseline.metric.measure(logits).to(self.values)
            if bool(measured.isnan().any()):
                cell = cells[int(measured.isnan().any(1).nonzero()[0])]
                raise MetricError(f"metric {self.metric.name} is NaN for the patch at {self.array.cells[cell]}")
            self._store(cells, pairs, measured)
            yield measured.numel()

    def _store(self, cells: list[int], pairs: list[int], values: Tensor) -> None:
        rows = torch.tensor(cells, dtype=torch.long)[:, None]
        self.values[rows, torch.tensor(pairs)] = values

    def _chunks(self, segments: list[Segment], baseline: Baseline) -> Iterator[list[Segment]]:
        """Whole cells, as many as run at once, in the order in which they enter."""
        by_cell: dict[int, list[Segment]] = {}
        for segment in sorted(segments, key=lambda s: (s.layer, s.start, s.cell)):
            by_cell.setdefault(segment.cell, []).append(segment)
        limit = self._limit(baseline)
        chunk: list[Segment] = []
        size = 0
        for members in by_cell.values():
            cost = sum(self._cost(segment) for segment in members)
            if chunk and size + cost > limit:
                yield chunk
                chunk, size = [], 0
            chunk += members
            size += cost
        if chunk:
            yield chunk

    def _limit(self, baseline: Baseline) -> int:
        if self.batch_size != "auto":
            return self.batch_size
        watches_pattern = any("key" in axes_of(name) for name in self.names)
        width = max(baseline.lengths)
        return tokens_per_pass(self.model, width, baseline.reads.shape[1], watches_pattern=watches_pattern)

    def _cost(self, segment: Segment) -> int:
        return segment.stop - segment.start if self.batch_size == "auto" else 1

    def _run_chunk(self, chunk: list[Segment], cells: list[int], baseline: Baseline) -> Tensor:
        """Logits `[cells pairs read d_vocab]`; pairs whose patch changes nothing have the unpatched run's."""
        limit = self._limit(baseline)
        parts: list[list[Segment]] = [[]]
        size = 0
        for segment in sorted(chunk, key=lambda s: (s.layer, s.start, s.cell)):
            size += self._cost(segment)
            lengths_clash = (
                not can_share(self.model, baseline)
                and parts[-1]
                and (parts[-1][-1].stop - parts[-1][-1].start != segment.stop - segment.start)
            )
            if parts[-1] and (size > limit or lengths_clash):
                parts.append([])
                size = self._cost(segment)
            parts[-1].append(segment)
        place = {cell: index for index, cell in enumerate(cells)}
        pieces = []
        for part in parts:
            run = Pass(self.model, baseline, self.array.cells, part)
            pieces.append(run.run())
            self.forwards += 1
            self.token_layers += run.token_layers
        found = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        ordered = [segment for part in parts for segment in part]
        at_cell = [place[segment.cell] for segment in ordered]
        at_pair = [segment.pair for segment in ordered]
        if len(baseline.pairs) == 1 and at_cell == list(range(len(cells))):
            return found[:, None]
        logits = baseline.into_logits[None].repeat(len(cells), 1, 1, 1)
        logits[at_cell, at_pair] = found
        return logits


def _check_options(batch_size: BatchSize, direction: Direction, source: Source) -> None:
    check_batch_size(batch_size)
    if direction not in ("denoise", "noise"):
        raise InputError(f"direction is {direction!r}; expected 'denoise' or 'noise'")
    if isinstance(source, str) and source not in ("other", "zero"):
        raise SiteError(f"source is {source!r}; expected 'other', 'zero', or tensors by hook name")
