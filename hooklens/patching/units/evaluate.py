"""How much of a behaviour a circuit of units keeps, all other units of its hook points ablated."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.splice import Splice
from hooklens.optional import import_package
from hooklens.patching.circuits.result import AblationResult
from hooklens.patching.errors import MetricError
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.results.over_pairs import Statistic
from hooklens.patching.results.result import SweepStats
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.tally import Tally
from hooklens.patching.units.circuit import UnitCircuit
from hooklens.patching.units.ground import UnitAblation, UnitGround, UnitRunner
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

if TYPE_CHECKING:
    import pandas

UnitCircuits = Mapping[str, UnitCircuit] | Mapping[int, UnitCircuit] | Sequence[UnitCircuit]


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class UnitResult(AblationResult):
    """Values of a metric for circuits of units, all other units of their hook points ablated.

    Attributes:
        circuits: what was run.
    """

    circuits: tuple[UnitCircuit, ...]

    def _sizes(self) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
        return ("units",), [(len(one),) for one in self.circuits]

    def to_dataframe(self, *, statistics: Sequence[Statistic] = ()) -> "pandas.DataFrame":
        """One row per circuit: units, value, its standard error, and faithfulness by both definitions.

        Args:
            statistics: what else to give, as for `CircuitResult.to_dataframe`.

        Raises:
            HookLensError, MissingDependencyError: as there.
        """
        columns = {"circuit": self.labels, "units": [len(circuit) for circuit in self.circuits]}
        table: pandas.DataFrame = import_package("pandas").DataFrame(columns | self._columns(statistics))
        return table


@reads()
@torch.no_grad()
def evaluate_units(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    circuits: UnitCircuits | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    splices: Sequence[Splice] = (),
    ablation: UnitAblation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> UnitResult:
    """Run circuits of units, all other units of the same hook points ablated at all positions.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        circuits: what is run: a list, or a mapping from label to circuit; all name the same hook points.
        metric: as for a sweep.
        splices, ablation, batch_size, attention_mask, progress, allow_training: as for `score_units`.

    Returns:
        One value per circuit and pair, with faithfulness as two papers define it. With an autoencoder whose error is
        dropped (`sae.at(name, error="drop")`) the whole network is the one with the reconstruction.

    Raises:
        InputError: no circuit, circuits of different hook points, or prompts that do not go together.
        HookNameError, SiteError: as for `score_units`.
        MetricError: the metric is NaN for a circuit, or NaN or infinite for an unpatched run.
        SweepInterruptedError: stopped, or failed on the way; it holds what was measured.
    """
    refuse_missing("evaluate_units", circuits=circuits, metric=metric)
    assert circuits is not None
    assert metric is not None
    options = RunOptions.read(model, batch_size=batch_size, progress=progress, allow_training=allow_training)
    listed, names = _read_circuits(circuits)
    labels = tuple(
        label if isinstance(label, str) else read_int(label, what="evaluate_units: a label that is no text")
        for label in (circuits if isinstance(circuits, Mapping) else range(len(listed)))
    )
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    runner = UnitRunner(
        model, prompts, names, as_metric(metric).encode(model), splices=splices, ablation=ablation,
        batch_size=options.batch_size,
    )  # fmt: skip
    tally = Tally(len(listed), len(prompts), dtype=wide_dtype(model.dtype), device=model.device)

    def work() -> None:
        with progress_bar("circuits", total=tally.n_values, unit="value", progress=options.progress) as bar:
            for pairs in runner.groups():
                ground = runner.prepare(pairs)
                masks = _stack_masks(listed, ground)
                none = {name: torch.zeros_like(mask[:1]) for name, mask in masks.items()}
                tally.begin(ground.clean, runner.measure(ground, none)[0], ground.lengths)
                size = runner.circuits_per_pass(ground)
                for first in range(0, len(listed), size):
                    rows = slice(first, first + size)
                    found = runner.measure(ground, {name: mask[rows] for name, mask in masks.items()})
                    if found.isnan().any():
                        broken = [labels[first + row] for row in found.isnan().any(1).nonzero()[:, 0].tolist()]
                        raise MetricError(f"metric {runner.metric.name} is NaN for the circuits {broken}")
                    tally.store(rows, found)
                    bar.update(found.numel())

    def result() -> UnitResult:
        full, empty = tally.ends()
        return UnitResult(
            circuits=tuple(listed),
            labels=labels,
            per_pair=tally.per_pair(),
            full_per_pair=full,
            empty_per_pair=empty,
            metric=runner.metric.name,
            ablation=runner.ablation_name,
            stats=SweepStats(
                cells=tally.n_cells,
                pairs=tally.n_pairs,
                unchanged=0,
                forwards=runner.forwards,
                tokens=runner.tokens,
                naive_forwards=(tally.n_cells + 3) * tally.n_pairs,
                naive_tokens=(tally.n_cells + 3) * sum(prompts.lengths),
            ),
        )

    return tally.finish("evaluating circuits of units", work, result)


def _read_circuits(circuits: object) -> tuple[list[UnitCircuit], list[str]]:
    """The circuits, and the hook points that all of them name.

    Raises:
        InputError: something else, or circuits of different hook points.
    """
    given = list(circuits.values() if isinstance(circuits, Mapping) else circuits) if circuits else []  # type: ignore[call-overload]
    wrong = sorted({type(circuit).__name__ for circuit in given if not isinstance(circuit, UnitCircuit)})
    if wrong or not given:
        found = f"holds {', '.join(wrong)}" if wrong else "is empty"
        raise InputError(f"evaluate_units takes a list of UnitCircuits, or a mapping to them; this one {found}")
    names = list(given[0].kept)
    for circuit in given:
        if set(circuit.kept) != set(names):
            differing = sorted(set(circuit.kept) ^ set(names))
            raise InputError(
                f"evaluate_units: circuits ablate the same hook points, and {differing} are in some of these alone; "
                "name those without kept units, too, with an empty list"
            )
    return given, names


def _stack_masks(circuits: Sequence[UnitCircuit], ground: UnitGround) -> dict[str, Tensor]:
    return {
        name: torch.stack([circuit.to_mask(name, own.shape[-1]) for circuit in circuits])
        for name, own in ground.own.items()
    }
