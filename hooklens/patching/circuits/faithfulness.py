"""Faithfulness: how much of a behaviour is left when everything outside a circuit is ablated.

Each circuit is run on the clean prompts with all other edges ablated (`masked_run` has the formula), and the
metric `m` of that run is put on a scale between the fully ablated run and the clean one (Wang et al. 2022; Hanna et
al. 2024, "Have Faith in Faithfulness"):

    faithfulness(C) = (m(C) - m(empty)) / (m(full) - m(empty))

1 means that the circuit alone does what the network does, 0 that it does no more than nothing. It is no share of
something conserved: a circuit without the parts that work against the behaviour lies above 1, one without the
parts that balance them below 0. The metric is averaged over pairs before the fraction is taken.

What it says depends on what is ablated to, see `ablation`, and it holds for the prompts that it was measured on.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.errors import MetricError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import check_additive
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import Prompt, read_pairs
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.runs.checks import check_model
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.progress import keep_partial_result
from hooklens.precision import wide_dtype

Circuits = Mapping[str, Circuit] | Mapping[int, Circuit] | Sequence[Circuit]


def evaluate_circuits(
    model: HookedCausalLM,
    clean: Prompt,
    corrupted: Prompt,
    circuits: Circuits,
    metric: Metric | MetricFunction,
    *,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> SweepResult:
    """Run circuits with everything outside them ablated.

    Args:
        model: the model; nothing may be attached to its hook points.
        clean: prompts whose behaviour is studied.
        corrupted: as many prompts of the same lengths, which ablated edges take their outputs from.
        circuits: what is run: a list, or a mapping from label to circuit.
        metric: as for a sweep. What compares with a run compares with that of the prompts: `KL()` with the clean
            prompts' predictions.
        ablation: what edges outside a circuit carry: what their writer writes on the corrupted prompt
            (`"resample"`), its mean over the corrupted prompts (`"mean"`), nothing (`"zero"`), or tensors by hook
            name.
        batch_size: prompts run at once, circuits times pairs; `"auto"` by memory.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Returns:
        One value per circuit, along the axis `"circuit"`, whose labels are the mapping's keys or numbers.
        `result.clean` is the metric of the clean run, `result.corrupted` that of the run with all edges ablated, so
        `result.normalized` is the faithfulness.

    Raises:
        SiteError: circuits with edges that the network has not, or an ablation of another shape.
        InputError: no circuit, prompts that do not go together, or a norm between heads and stream.
        MetricError: the metric gives another shape than one value per row, or NaN.
        SweepInterruptedError: stopped, or failed on the way; it holds what was measured.

    Example:
        >>> found = {"name movers": Circuit([("embed", "a0.h1.v"), ("a0.h1", "logits")])}
        >>> evaluate_circuits(model, clean, corrupted, found, LogitDiff(" Mary", " John")).normalized
    """
    check_model(model, allow_training=allow_training)
    check_additive(model.cfg)
    masks = _stack_masks(model, circuits)
    prompts = read_pairs(model, clean, corrupted, attention_mask)
    with torch.no_grad():
        runner = CircuitRunner(model, prompts, as_metric(metric), ablation=ablation, batch_size=batch_size)
        return _Evaluation(runner, circuits, masks).finish(progress=progress)


class _Evaluation:
    """An evaluation in progress: the values so far."""

    def __init__(self, runner: CircuitRunner, circuits: Circuits, masks: Tensor) -> None:
        self.runner, self.masks = runner, masks
        given = circuits.values() if isinstance(circuits, Mapping) else circuits
        self.labels: tuple[int | str, ...] = tuple(circuits if isinstance(circuits, Mapping) else range(len(circuits)))
        self.sizes = [len(circuit) for circuit in given]
        model, n_pairs = runner.model, len(runner.prompts)
        dtype = wide_dtype(model.dtype)
        self.values = torch.full((len(masks), n_pairs), torch.nan, dtype=dtype, device=model.device)
        self.ends = torch.full((2, n_pairs), torch.nan, dtype=dtype, device=model.device)

    def finish(self, *, progress: bool) -> SweepResult:
        """Run all circuits on all pairs."""
        groups = list(self.runner.groups())
        # Before the first circuit is run, a failure is a mistake in the call and not an interruption.
        ground = self.runner.prepare(groups[0])
        name, unit = "evaluating circuits", "circuits"
        with keep_partial_result(name, unit, self.values, self.result, progress=progress) as bar:
            for number, group in enumerate(groups):
                ground = ground if number == 0 else self.runner.prepare(group)
                self.ends[0, group] = ground.baseline.clean.to(self.ends)
                self.ends[1, group] = self.runner.measure_ablated(ground).to(self.ends)
                size = self.runner.rows_per_batch(ground)
                for first in range(0, len(self.masks), size):
                    rows = slice(first, first + size)
                    measured = self.runner.measure(ground, self.masks[rows]).to(self.values)
                    self._check(measured, first)
                    self.values[rows, group[0] : group[-1] + 1] = measured
                    bar.update(measured.numel())
        return self.result()

    def _check(self, measured: Tensor, first: int) -> None:
        broken = measured.isnan().any(1).nonzero()[:, 0].tolist()
        if broken:
            labels = [self.labels[first + row] for row in broken]
            raise MetricError(f"metric {self.runner.metric.name} is NaN for the circuits {labels}")

    def result(self) -> SweepResult:
        """The values so far."""
        runner = self.runner
        n_naive = self.values.numel() + 2 * len(runner.prompts)
        return SweepResult(
            per_pair=self.values.clone(),
            axes={"circuit": self.labels},
            clean_per_pair=self.ends[0].clone(),
            corrupted_per_pair=self.ends[1].clone(),
            cells=tuple({"circuit": label, "edges": size} for label, size in zip(self.labels, self.sizes, strict=True)),
            metric=runner.metric.name,
            direction="denoise",
            stats=SweepStats(
                cells=len(self.values),
                pairs=len(runner.prompts),
                unchanged=0,
                forwards=runner.forwards,
                tokens=runner.token_layers / runner.model.cfg.n_layers,
                naive_forwards=n_naive,
                naive_tokens=(len(self.values) + 2) * sum(runner.prompts.lengths),
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
