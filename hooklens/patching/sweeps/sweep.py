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

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.optional import import_package
from hooklens.patching.errors import MetricError, SiteError
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import GroupSize, Pairs, PairSource, read_source
from hooklens.patching.pairs.prompts import Prompt, PromptPairs
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.runs.baseline import Baseline, Direction, run_baseline
from hooklens.patching.runs.checks import check_source
from hooklens.patching.runs.memory import BatchSize, pairs_per_group, tokens_per_pass
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.other_model import check_other_model
from hooklens.patching.runs.sites import CellArray, Sites, lay_out
from hooklens.patching.runs.tally import Tally
from hooklens.patching.runs.unpatched import Source
from hooklens.patching.sweeps.in_full import run_in_full
from hooklens.patching.sweeps.packing import Segment
from hooklens.patching.sweeps.passes import Pass
from hooklens.patching.sweeps.plan import axes_of, can_share, plan_segments
from hooklens.precision import wide_dtype


def sweep(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Prompt | None = None,
    sites: Sites | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    batch_size: BatchSize = "auto",
    direction: Direction = "denoise",
    source: Source = "other",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> SweepResult:
    """Patch every cell of a grid and measure what it does.

    Args:
        model: the model; nothing may be attached to its hook points.
        clean: prompts whose behaviour is studied: text, a list of texts, or token ids. With `corrupted=None` a
            `Pair`, a list of pairs, or a loader of them (see `hooklens.patching.pairs.loader`), which is read group
            by group, so that thousands of pairs need no more memory than a few.
        corrupted: as many prompts of the same lengths.
        sites: a hook word (`"resid_pre"`), a `patching.grid(...)`, or a list of these.
        metric: a value such as `patching.LogitDiff(answer, wrong)`, or a function from logits
            `[batch pos d_vocab]` to `[batch]`, see `FunctionMetric`.
        batch_size: patched prompts per pass; `"auto"` by memory.
        direction: `"denoise"` patches the corrupted run, `"noise"` the clean one.
        source: what is put in: the `"other"` run's activation, `"zero"`, or tensors by hook name that broadcast
            to `[pairs pos ...]`: means over a data set, or the activations of a resampled example. Or another model,
            which then makes the other run: with `"denoise"` its activations on the clean prompts go into this model's
            run on the corrupted ones (which may be the same prompts), and `result.clean` is the metric of its run.
        attention_mask: real tokens (1) of padded ids, the same for both.
        edits: values from `hooklens.edits` that act in every run, the unpatched ones included (but for that of another
            model); the patch acts last at its own hook point. `hooklens.patching.runs.edits` says what their rows and
            positions mean; `result.stats.unplanned` counts the full forwards that functions of one's own take.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: prompts that do not go together, options that are none, or hooks attached to the model.
        HookNameError, SiteError: a site, layer, position or head that is not there, or a site where a source model
            has another shape.
        EditError: an edit that does not fit the model or the prompts.
        TransformError: a source that is a model with other processing, or the cache of one.
        MetricError: the metric gives another shape than one value per row, or NaN; or an unpatched run's is infinite.
        SweepInterruptedError: the sweep was stopped, or failed on the way; it holds what was measured.

    Example:
        >>> result = patching.sweep(model, clean, corrupted, "resid_pre", patching.LogitDiff(" Mary", " John"))
        >>> result.top(5)
        >>> pairs = [patching.Pair.from_text(model, clean, corrupted, answer=" Mary", wrong=" John")]
        >>> result = patching.sweep(model, pairs, sites="z", metric=patching.LogitDiff())
        >>> result = patching.sweep(base, prompts, prompts, "resid_post", patching.LogitDiff(), source=tuned)

        Self-repair: with the heads that move names ablated, which heads take over?

        >>> movers = [edits.Zero("blocks.9.attn.hook_z", head=[6, 9])]
        >>> repaired = patching.sweep(model, pairs, sites="z", metric=patching.LogitDiff(), edits=movers)
        >>> (repaired.values - result.values).abs()
    """
    refuse_missing("sweep", sites=sites, metric=metric)
    assert sites is not None
    assert metric is not None
    options = RunOptions.read(
        model,
        batch_size=batch_size,
        direction=direction,
        progress=progress,
        allow_training=allow_training,
        edits=edits,
    )
    _check_activations(model, source)
    measured = as_metric(metric).encode(model)
    pairs = read_source(model, clean, corrupted, attention_mask)
    if pairs.n_pairs is None and measured.needs_all_pairs:
        raise InputError(
            f"metric {measured.name} is a function that sees all pairs at once, so it cannot go through a loader; give "
            "the pairs as a list, or a metric such as patching.LogitDiff"
        )
    options.edits.check_pairs(pairs.at_hand.lengths, pairs.n_pairs)
    array = lay_out(sites, model, pairs.at_hand.lengths, more_follow=pairs.n_pairs is None)
    if isinstance(source, HookedCausalLM):
        names = list(dict.fromkeys(cell.name for cell in array.cells))
        check_other_model(model, source, names, allow_training=options.allow_training)
    return SweepRun(model, pairs, array, measured, options, source).finish()


class SweepRun:
    """A sweep in progress: the cells still to run and the values so far.

    Args:
        model: the model.
        pairs: the pairs.
        array: the cells.
        metric: what is measured.
        options: how it runs.
        source: what is put in.
    """

    def __init__(
        self,
        model: HookedCausalLM,
        pairs: PairSource,
        array: CellArray,
        metric: Metric,
        options: RunOptions,
        source: Source,
    ) -> None:
        self.model, self.pairs, self.array, self.metric = model, pairs, array, metric
        self.options, self.source = options, source
        self.names = list(dict.fromkeys(cell.name for cell in array.cells))
        self.tally = Tally(len(array.cells), pairs.n_pairs, dtype=wide_dtype(model.dtype), device=model.device)
        self.forwards, self.token_layers, self.unchanged, self.unplanned = 0, 0, 0, 0

    def finish(self) -> SweepResult:
        """Run all cells of all pairs.

        Raises:
            SweepInterruptedError: stopped on the way.
        """
        return self.tally.finish("the sweep", self._run, self.result)

    def _run(self) -> None:
        tqdm = import_package("tqdm").tqdm
        with (
            torch.no_grad(),
            tqdm(total=self.tally.n_values, desc="patching", disable=not self.options.progress) as bar,
        ):
            for prompts, chosen in self.pairs.groups(self._group_size()):
                self.array.check_lengths(prompts.lengths, prompts.first)
                baseline = self._run_baseline(prompts, chosen)
                run_group = self._run_group if baseline.is_planned else self._run_unplanned
                for done in run_group(baseline):
                    bar.update(done)

    def result(self) -> SweepResult:
        """The values so far."""
        shape = [len(labels) for labels in self.array.axes.values()]
        n_cells, n_pairs = self.tally.n_cells, self.tally.n_pairs
        n_tokens = self.tally.n_tokens if self.pairs.n_pairs is None else sum(self.pairs.at_hand.lengths)
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
        clean, corrupted = self.tally.ends()
        return SweepResult(
            per_pair=self.tally.per_pair().view(*shape, -1),
            axes=self.array.axes,
            clean_per_pair=clean,
            corrupted_per_pair=corrupted,
            cells=tuple(cell.describe() for cell in self.array.cells),
            metric=self.metric.name,
            direction=self.options.direction,
            stats=stats,
        )

    def _group_size(self) -> GroupSize | None:
        """How many pairs' unpatched runs are held at the same time; a function of logits needs all at once."""
        if self.metric.needs_all_pairs:
            return None
        positions = self.metric.positions

        def size(width: int) -> int:
            n_reads = width if positions is None else len(positions)
            return pairs_per_group(self.model, width, self.names, n_reads)

        return size

    def _run_baseline(self, prompts: PromptPairs, chosen: list[int]) -> Baseline:
        baseline = run_baseline(
            self.model,
            prompts,
            chosen,
            self.names,
            self.metric,
            direction=self.options.direction,
            source=self.source,
            answers_only=True,
            edits=self.options.edits,
        )
        self.forwards += self._n_unpatched(baseline)
        self.token_layers += 2 * len(chosen) * max(baseline.lengths) * self.model.cfg.n_layers
        self.tally.begin(baseline.clean, baseline.corrupted, baseline.lengths)
        return baseline

    def _run_group(self, baseline: Baseline) -> Iterator[int]:
        """Run all cells of a group of pairs; gives how many values each step has added."""
        segments = plan_segments(self.model, self.array.cells, baseline)
        n_cells, n_pairs = self.tally.n_cells, len(baseline.pairs)
        base = baseline.corrupted if self.options.direction == "denoise" else baseline.clean
        touched = {segment.cell for segment in segments}
        still = [cell for cell in range(n_cells) if cell not in touched]
        self.tally.store(still, base.expand(len(still), -1))
        self.unchanged += n_cells * n_pairs - len(segments)
        yield len(still) * n_pairs

        for chunk in self._chunks(segments, baseline):
            cells = list(dict.fromkeys(segment.cell for segment in chunk))
            yield self._measure(cells, self._run_chunk(chunk, cells, baseline), baseline)

    def _run_unplanned(self, baseline: Baseline) -> Iterator[int]:
        """Run all cells of a group of pairs in full, each prompt by itself."""
        for index, cell in enumerate(self.array.cells):
            logits = [run_in_full(self.model, baseline, cell, pair) for pair in range(len(baseline.pairs))]
            self.forwards += len(logits)
            self.unplanned += len(logits)
            self.token_layers += sum(baseline.lengths) * self.model.cfg.n_layers
            yield self._measure([index], torch.stack(logits)[None], baseline)

    def _measure(self, cells: list[int], logits: Tensor, baseline: Baseline) -> int:
        """Measure cells and keep their values; gives how many these are."""
        measured = baseline.metric.measure(logits)
        if bool(measured.isnan().any()):
            cell = cells[int(measured.isnan().any(1).nonzero()[0])]
            raise MetricError(f"metric {self.metric.name} is NaN for the patch at {self.array.cells[cell]}")
        self.tally.store(cells, measured)
        return measured.numel()

    def _n_unpatched(self, baseline: Baseline) -> int:
        """Passes that the unpatched runs took."""
        of_other = isinstance(self.source, HookedCausalLM)
        if baseline.is_planned:
            return 2 if of_other else 1
        return len(baseline.pairs) + (1 if of_other else len(baseline.pairs))

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
        if self.options.batch_size != "auto":
            return self.options.batch_size
        watches_pattern = any("key" in axes_of(name) for name in self.names)
        width = max(baseline.lengths)
        return tokens_per_pass(self.model, width, baseline.reads.shape[1], watches_pattern=watches_pattern)

    def _cost(self, segment: Segment) -> int:
        return segment.stop - segment.start if self.options.batch_size == "auto" else 1

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


def _check_activations(model: HookedCausalLM, source: Source) -> None:
    """Refuse what is no source of activations."""
    is_word = isinstance(source, str) and source in ("other", "zero")
    if not (is_word or isinstance(source, Mapping | HookedCausalLM)):
        raise SiteError(f"source is {show(source)}; expected 'other', 'zero', tensors by hook name, or another model")
    check_source(model, source)
