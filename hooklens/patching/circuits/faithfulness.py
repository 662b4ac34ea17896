"""Faithfulness: how much of a behaviour is left when everything outside a circuit is ablated.

Each circuit is run on the clean prompts with all other edges ablated (`masked_run` has the formula), and the metric of
that run is compared with the clean run's. `CircuitResult` names the two usual ways: Hanna et al. 2024 put it on a scale
from the fully ablated run (0) to the clean one (1), Wang et al. 2022 take the absolute difference to the clean run.

A number of faithfulness goes with how it was measured. Miller et al. 2024 ("Transformer Circuit Faithfulness Metrics
Are Not Robust") show that the same circuit comes out very differently, and the best circuit is another one, depending
on

- what is ablated: *edges* (here), which leaves a node in the circuit its other outputs, or whole *nodes*;
- what they are ablated to: see `ablation`. Zeros and means are far off what the network knows; resampled activations
  are not, but keep what both prompts share, so a circuit needs no edges for that;
- which positions: here an edge is ablated at *all* positions of a prompt, where others name single positions;
- which token, metric and average: both definitions compare means over pairs, in which gains and losses cancel.

So report the ablation beside the number, and compare only circuits that were measured alike. It holds for the prompts
that it was measured on.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.ground import Ground
from hooklens.patching.circuits.result import CircuitResult
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.errors import MetricError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import check_additive, check_heads_apart
from hooklens.patching.metrics.function import MetricFunction
from hooklens.patching.metrics.group import MetricGroup, Metrics
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.results.result import SweepStats
from hooklens.patching.results.several import Results
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.tally import Tally
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

Circuits = Mapping[str, Circuit] | Mapping[int, Circuit] | Sequence[Circuit]


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hooklens.patching.runs.options import RunKeywords

    class CircuitKeywords(RunKeywords, total=False):
        """The keywords of runs of circuits."""

        ablation: Ablation


if TYPE_CHECKING:

    @overload
    def evaluate_circuits(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        circuits: Circuits | None = ...,
        metric: Metric | MetricFunction | None = ...,
        **options: Unpack[CircuitKeywords],
    ) -> CircuitResult: ...
    @overload
    def evaluate_circuits(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        circuits: Circuits | None = ...,
        *,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[CircuitKeywords],
    ) -> Results[CircuitResult]: ...
    @overload
    def evaluate_circuits(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None,
        circuits: Circuits | None,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[CircuitKeywords],
    ) -> Results[CircuitResult]: ...


@reads()
def evaluate_circuits(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    circuits: Circuits | None = None,
    metric: Metrics | None = None,
    *,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> CircuitResult | Results[CircuitResult]:
    """Run circuits with everything outside them ablated.

    Args:
        model: the model; nothing may be attached to its hook points.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths for ablated edges to take outputs from; or `patching.Noise`.
        circuits: what is run: a list, or a mapping from label to circuit.
        metric: as for a sweep; several by name give a result for each. What compares with a run compares with that of
            the prompts: `KL()` with the clean prompts' predictions.
        ablation: what edges outside a circuit carry: what their writer writes on the corrupted prompt
            (`"resample"`), its mean over the corrupted prompts (`"mean"`), nothing (`"zero"`), or tensors by hook
            name.
        batch_size: prompts run at once, circuits times pairs; `"auto"` by memory.
        attention_mask: real tokens (1) of padded ids, the same for both.
        edits: values from `hooklens.edits` that act in every run: inside nodes, at their outputs, at the embeddings or
            behind the blocks; `Add` also in the stream. `hooklens.patching.runs.edits` says what their rows and
            positions are.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Returns:
        One value per circuit and pair, labelled by the mapping's keys or numbers, with `faithfulness_hanna` and
        `faithfulness_wang`.

    Raises:
        SiteError: circuits with edges that the network has not, or an ablation of another shape.
        InputError: no circuit, prompts that do not go together, or a norm between heads and stream.
        EditError: an edit that does not fit the model or the prompts, or stands between nodes.
        MetricError: the metric gives another shape than one value per row, or NaN; or an unpatched run's is infinite.
        SweepInterruptedError: stopped, or failed on the way; it holds what was measured.

    Example:
        >>> found = {"name movers": Circuit([("embed", "a0.h1.v"), ("a0.h1", "logits")])}
        >>> evaluate_circuits(model, clean, corrupted, found, LogitDiff(" Mary", " John")).faithfulness_hanna
    """
    refuse_missing("evaluate_circuits", circuits=circuits, metric=metric)
    assert circuits is not None
    assert metric is not None
    options = RunOptions.read(
        model, batch_size=batch_size, progress=progress, allow_training=allow_training, edits=edits
    )
    check_additive(model.cfg)
    check_heads_apart(model.cfg)
    masks = _stack_masks(model, circuits)
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    with torch.no_grad():
        measured = MetricGroup.read(metric).encode(model)
        runner = CircuitRunner(
            model, prompts, measured, ablation=ablation, batch_size=options.batch_size, edits=options.edits
        )
        return _Evaluation(runner, circuits, masks).finish(progress=options.progress)


class _Evaluation:
    """An evaluation in progress: the values so far."""

    def __init__(self, runner: CircuitRunner, circuits: Circuits, masks: Tensor) -> None:
        self.runner, self.masks = runner, masks
        self.circuits = tuple(circuits.values() if isinstance(circuits, Mapping) else circuits)
        self.labels: tuple[int | str, ...] = tuple(
            label if isinstance(label, str) else read_int(label, what="evaluate_circuits: a label that is no text")
            for label in (circuits if isinstance(circuits, Mapping) else range(len(circuits)))
        )
        model = runner.model
        self.tallies = [
            Tally(len(masks), len(runner.prompts), dtype=wide_dtype(model.dtype), device=model.device)
            for _ in runner.metrics.metrics
        ]
        # How far the evaluation has come.
        self.tally = self.tallies[0]

    def finish(self, *, progress: bool) -> CircuitResult | Results[CircuitResult]:
        """Run all circuits on all pairs."""

        def work() -> None:
            with progress_bar("circuits", total=self.tally.n_values, unit="value", progress=progress) as bar:
                for group in self.runner.groups():
                    for done in self._run_group(self.runner.prepare(group)):
                        bar.update(done)

        return self.tally.finish("evaluating circuits", work, self.result)

    def _run_group(self, ground: Ground) -> Iterator[int]:
        """Run all circuits on some pairs; gives how many values each step has added."""
        empty = self.runner.measure_each_ablated(ground)
        for metric, ablated in zip(self.runner.metrics.metrics.values(), empty, strict=True):
            if not ablated.isfinite().all():
                raise MetricError(
                    f"metric {metric.name} is NaN or infinite with every edge ablated; no circuit could be compared "
                    "with that"
                )
        for tally, (clean, _), ablated in zip(self.tallies, ground.ends, empty, strict=True):
            tally.begin(clean, ablated, ground.lengths)
        size = self.runner.rows_per_batch(ground)
        for first in range(0, len(self.masks), size):
            rows = slice(first, first + size)
            values, _ = self.runner.run(ground, self.masks[rows])
            for metric, measured in zip(self.runner.metrics.metrics.values(), values, strict=True):
                self._check(metric, measured, first)
            for tally, measured in zip(self.tallies, values, strict=True):
                tally.store(rows, measured)
            yield values[0].numel()

    def _check(self, metric: Metric, measured: Tensor, first: int) -> None:
        broken = measured.isnan().any(1).nonzero()[:, 0].tolist()
        if broken:
            labels = [self.labels[first + row] for row in broken]
            raise MetricError(f"metric {metric.name} is NaN for the circuits {labels}")

    def result(self) -> CircuitResult | Results[CircuitResult]:
        """The values so far."""
        metrics = self.runner.metrics
        if metrics.is_single:
            return self._result_of(metrics.name, self.tally)
        tallies = zip(metrics.metrics, self.tallies, strict=True)
        return Results({name: self._result_of(name, tally) for name, tally in tallies})

    def _result_of(self, name: str, tally: Tally) -> CircuitResult:
        runner = self.runner
        full, empty = tally.ends()
        return CircuitResult(
            circuits=self.circuits,
            labels=self.labels,
            per_pair=tally.per_pair(),
            full_per_pair=full,
            empty_per_pair=empty,
            metric=name,
            ablation=runner.ablation_name,
            stats=SweepStats(
                cells=tally.n_cells,
                pairs=tally.n_pairs,
                unchanged=0,
                forwards=runner.forwards,
                tokens=runner.token_layers / runner.model.cfg.n_layers,
                naive_forwards=(tally.n_cells + 2) * tally.n_pairs,
                naive_tokens=(tally.n_cells + 2) * sum(runner.prompts.lengths),
            ),
        )


def _stack_masks(model: HookedCausalLM, circuits: Circuits) -> Tensor:
    """The circuits as masks `[circuit reader writer]`."""
    given = list(circuits.values() if isinstance(circuits, Mapping) else circuits)
    if not given:
        raise InputError("evaluate_circuits needs at least one circuit")
    wrong = sorted({type(circuit).__name__ for circuit in given if not isinstance(circuit, Circuit)})
    if wrong:
        raise InputError(
            f"evaluate_circuits takes a list of circuits, or a mapping to them; this one holds {', '.join(wrong)}. "
            "Make them with Circuit(edges), and give a single one as [circuit]"
        )
    return torch.stack([circuit.to_mask(model.cfg) for circuit in given])
