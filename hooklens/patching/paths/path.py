"""The experiment: what each sender does through the receivers, over any number of pairs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.patching.errors import MetricError
from hooklens.patching.graph.nodes import Writer, check_additive, list_writers, parse_readers, parse_writers
from hooklens.patching.metrics.function import MetricFunction
from hooklens.patching.metrics.group import MetricGroup, Metrics
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted, PromptPairs
from hooklens.patching.paths.ground import Ground, lay_ground
from hooklens.patching.paths.passes import PathPass
from hooklens.patching.paths.route import Route, outputs_of
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.results.several import Results
from hooklens.patching.runs.baseline import Baseline, Direction, run_baseline
from hooklens.patching.runs.edits import check_node_edits
from hooklens.patching.runs.memory import BatchSize, pairs_per_group, tokens_per_pass
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.tally import Tally
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hooklens.patching.runs.options import RunKeywords

    class PathKeywords(RunKeywords, total=False):
        """The keywords of path patching."""

        through_mlps: bool
        direction: Direction


if TYPE_CHECKING:

    @overload
    def path_patch(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        senders: Sequence[str] | None = ...,
        receivers: Sequence[str] | None = ...,
        metric: Metric | MetricFunction | None = ...,
        **options: Unpack[PathKeywords],
    ) -> SweepResult: ...
    @overload
    def path_patch(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        senders: Sequence[str] | None = ...,
        receivers: Sequence[str] | None = ...,
        *,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[PathKeywords],
    ) -> Results[SweepResult]: ...
    @overload
    def path_patch(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None,
        senders: Sequence[str] | None,
        receivers: Sequence[str] | None,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[PathKeywords],
    ) -> Results[SweepResult]: ...


@reads()
def path_patch(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    senders: Sequence[str] | None = None,
    receivers: Sequence[str] | None = None,
    metric: Metrics | None = None,
    *,
    through_mlps: bool = True,
    batch_size: BatchSize = "auto",
    direction: Direction = "denoise",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> SweepResult | Results[SweepResult]:
    """Measure what each sender does through the receivers: the page of `hooklens.patching.paths` has the definition.

    Args:
        model: the model; nothing may be attached to its hook points.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        senders: names of writers (`"embed"`, `"a3.h5"`, `"m3"`), each patched by itself; None: all.
        receivers: names of readers (`"a9.h6.q"`, `"m7"`, `"logits"`), all of them together: the paths over any of them.
        metric: as for a sweep; several by name give a result for each.
        through_mlps: let the change pass MLPs between sender and receivers; False: only the direct path.
        batch_size: patched prompts per pass, senders times pairs; `"auto"` by memory.
        direction: which run is patched.
        attention_mask: real tokens (1) of padded ids, the same for both.
        edits: values from `hooklens.edits` that act in every run: inside nodes, at `hook_z` and `hook_mlp_out`, at the
            embeddings or behind the blocks. `hooklens.patching.runs.edits` says what their rows and positions are.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Returns:
        One value per sender. A sender from which no path leads to a receiver has that of the run that is patched, and
        counts as unchanged in `result.stats`.

    Raises:
        SiteError: unknown senders or receivers; all of them are named.
        InputError: no sender or receiver, or a norm between heads and stream.
        EditError: an edit that does not fit the model or the prompts, or stands between nodes.
        MetricError: the metric gives another shape than one value per row, or NaN; or an unpatched run's is infinite.
        SweepInterruptedError: stopped, or failed on the way; it holds what was measured.
    """
    refuse_missing("path_patch", receivers=receivers, metric=metric)
    assert receivers is not None
    assert metric is not None
    options = RunOptions.read(
        model, batch_size=batch_size, direction=direction, progress=progress, allow_training=allow_training, edits=edits
    )
    cfg = model.cfg
    check_additive(cfg)
    sending = list_writers(cfg) if senders is None else parse_writers(senders, cfg)
    receiving = parse_readers(receivers, cfg)
    if not sending or not receiving:
        raise InputError("path_patch needs at least one sender and one receiver")
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    check_node_edits(options.edits, prompts, by_paths=True)
    route = Route(cfg, tuple(receiving), through_mlps)
    with torch.no_grad():
        experiment = _PathPatching(
            model,
            prompts,
            MetricGroup.read(metric).encode(model),
            sending,
            route,
            options,
        )
        return experiment.finish()


class _PathPatching:
    """Path patching in progress: the values so far."""

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        metrics: MetricGroup,
        senders: Sequence[Writer],
        route: Route,
        options: RunOptions,
    ) -> None:
        self.model, self.prompts, self.metrics, self.route = model, prompts, metrics, route
        self.options, self.senders = options, list(senders)
        reaching = [index for index, sender in enumerate(senders) if route.reaches(sender)]
        self.order = sorted(reaching, key=lambda index: route.entry(senders[index]))
        self.still = [index for index in range(len(senders)) if index not in set(reaching)]
        first = route.entry(senders[self.order[0]]) if self.order else (model.cfg.n_layers, 0)
        self.in_place = route.attends_from(first) == model.cfg.n_layers and not options.edits.needs_whole_rows
        self.carried = route.carries_from(first) < model.cfg.n_layers
        self.names = self._names_to_keep(first[0])
        self.tallies = [
            Tally(len(senders), len(prompts), dtype=wide_dtype(model.dtype), device=model.device)
            for _ in metrics.metrics
        ]
        # How far the experiment has come.
        self.tally = self.tallies[0]
        self.forwards, self.token_layers = 0, 0.0

    def finish(self) -> SweepResult | Results[SweepResult]:
        """Run all senders on all pairs.

        Raises:
            SweepInterruptedError: stopped on the way.
        """
        return self.tally.finish("path patching", self._run, self.result)

    def _run(self) -> None:
        with progress_bar("senders", total=self.tally.n_values, unit="value", progress=self.options.progress) as bar:
            for group in self.prompts.split(self._pairs_per_group()):
                for done in self._run_group(group, self._run_baseline(group)):
                    bar.update(done)

    def result(self) -> SweepResult | Results[SweepResult]:
        """The values so far."""
        if self.metrics.is_single:
            return self._result_of(self.metrics.name, self.tally)
        tallies = zip(self.metrics.metrics, self.tallies, strict=True)
        return Results({name: self._result_of(name, tally) for name, tally in tallies})

    def _result_of(self, name: str, tally: Tally) -> SweepResult:
        n_pairs, n_senders, n_tokens = len(self.prompts), len(self.senders), sum(self.prompts.lengths)
        receivers = ", ".join(map(str, self.route.receivers))
        clean, corrupted = tally.ends()
        return SweepResult(
            per_pair=tally.per_pair(),
            axes={"sender": tuple(map(str, self.senders))},
            clean_per_pair=clean,
            corrupted_per_pair=corrupted,
            cells=tuple({"sender": str(sender), "receivers": receivers} for sender in self.senders),
            metric=name,
            direction=self.options.direction,
            stats=SweepStats(
                cells=n_senders,
                pairs=n_pairs,
                unchanged=len(self.still) * n_pairs,
                forwards=self.forwards,
                tokens=self.token_layers / self.model.cfg.n_layers,
                naive_forwards=(2 + 2 * n_senders) * n_pairs,
                naive_tokens=(2 + 2 * n_senders) * n_tokens,
            ),
        )

    def _names_to_keep(self, first: int) -> list[str]:
        """What the unpatched runs hand on: what senders write, what MLPs on the way read and write, and attention."""
        names = outputs_of([self.senders[index] for index in self.order])
        for layer in range(first, self.model.cfg.n_layers):
            if self.route.runs_mlp(layer):
                names += [f"blocks.{layer}.hook_mlp_in", f"blocks.{layer}.hook_mlp_out"]
            if self.route.attends_alone(layer):
                names.append(f"blocks.{layer}.hook_attn_out")
        return list(dict.fromkeys(names))

    def _pairs_per_group(self) -> int | None:
        """How many pairs' unpatched runs are held at the same time; a function of logits needs all at once."""
        if self.metrics.needs_all_pairs:
            return None
        width = max(self.prompts.lengths)
        return min(pairs_per_group(self.model, width, self.names, self._n_reads()), self._pairs_per_pass(width))

    def _n_reads(self) -> int:
        return self.metrics.n_positions or max(self.prompts.lengths)

    def _pairs_per_pass(self, width: int) -> int:
        """More pairs than this make a pass of one sender no cheaper."""
        size = self.options.batch_size
        return size if size != "auto" else max(1, self._tokens_per_pass(width) // width)

    def _tokens_per_pass(self, width: int) -> int:
        return tokens_per_pass(self.model, width, self._n_reads(), watches_pattern=False)

    def _run_baseline(self, group: list[int]) -> Baseline:
        baseline = run_baseline(
            self.model,
            self.prompts,
            group,
            [],
            self.metrics,
            direction=self.options.direction,
            source="other",
            keep=self.names,
            edits=self.options.edits,
        )
        self.forwards += 1
        self.token_layers += 2 * len(group) * max(baseline.lengths) * self.model.cfg.n_layers
        for tally, ends in zip(self.tallies, baseline.ends, strict=True):
            tally.begin(*ends, baseline.lengths)
        return baseline

    def _run_group(self, group: list[int], baseline: Baseline) -> Iterator[int]:
        """Run all senders on a group of pairs; gives how many values each step has added."""
        for tally, (clean, corrupted) in zip(self.tallies, baseline.ends, strict=True):
            base = corrupted if self.options.direction == "denoise" else clean
            tally.store(self.still, base.expand(len(self.still), -1))
        yield len(self.still) * len(group)
        if not self.order:
            return
        grounds = self._lay_grounds(group, baseline)
        n_senders = self._senders_per_pass(grounds[0])
        for first in range(0, len(self.order), n_senders):
            rows = self.order[first : first + n_senders]
            logits = torch.cat([self._run_pass(ground, rows) for ground in grounds], dim=1)
            values = baseline.metrics.measure(logits)
            for metric, measured in zip(self.metrics.metrics.values(), values, strict=True):
                broken = [str(self.senders[row]) for row, nan in zip(rows, measured.isnan().any(1), strict=True) if nan]
                if broken:
                    raise MetricError(f"metric {metric.name} is NaN for the senders {broken}")
            for tally, measured in zip(self.tallies, values, strict=True):
                tally.store(rows, measured)
            yield values[0].numel()

    def _lay_grounds(self, group: list[int], baseline: Baseline) -> list[Ground]:
        """The group's pairs, as many together as a pass of one sender runs."""
        width = max(baseline.lengths)
        size = self._pairs_per_pass(width)
        return [
            lay_ground(
                self.model,
                baseline,
                self.prompts.differ(group, width),
                slice(first, min(first + size, len(group))),
                in_place=self.in_place,
                carried=self.carried,
            )
            for first in range(0, len(group), size)
        ]

    def _senders_per_pass(self, ground: Ground) -> int:
        if self.options.batch_size != "auto":
            return max(1, self.options.batch_size // ground.n_pairs)
        return max(1, self._tokens_per_pass(ground.width) // (ground.n_pairs * ground.width))

    def _run_pass(self, ground: Ground, rows: list[int]) -> Tensor:
        run = PathPass(ground, self.route, [self.senders[row] for row in rows])
        logits = run.run()
        self.forwards += run.token_layers > 0
        self.token_layers += run.token_layers
        return logits
