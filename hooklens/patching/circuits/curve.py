"""The faithfulness curve: how much of a behaviour circuits of growing size keep.

Edges are ranked by their scores, and the circuits of the first 1, 2, 4, ... of them are run with the rest ablated
(Hanna et al. 2024, by whose definition faithfulness is shown; `faithfulness` says what goes with such a number). A
behaviour that few edges carry shows as a curve that reaches 1 early. Curves compare rankings, too: the better ranking
has the larger area (Mueller et al. 2025, "MIB").
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_one_of, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.figures import Backend, draw_curve
from hooklens.hooks.edits import Edit
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.faithfulness import evaluate_circuits
from hooklens.patching.circuits.result import CircuitResult
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.metrics.function import MetricFunction
from hooklens.patching.metrics.group import MetricGroup, Metrics
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs
from hooklens.patching.pairs.prompts import Prompt
from hooklens.patching.results.edge_scores import EdgeScores
from hooklens.patching.results.over_pairs import Statistic
from hooklens.patching.results.several import Results
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import refuse_missing

if TYPE_CHECKING:
    import pandas

_N_SIZES = 20


@dataclass(frozen=True, eq=False, kw_only=True)
class FaithfulnessCurve:
    """Circuits of growing size, and how faithful they are.

    Attributes:
        result: the circuits, the smallest first, and their values; its `stats` say what they took.
    """

    result: CircuitResult

    @property
    def circuits(self) -> tuple[Circuit, ...]:
        """What was run, the smallest first."""
        return self.result.circuits

    @property
    def sizes(self) -> tuple[int, ...]:
        """Edges of each circuit."""
        return tuple(len(circuit) for circuit in self.circuits)

    @property
    def values(self) -> Float[Tensor, " circuit"]:
        """The metric of each circuit, averaged over pairs."""
        return self.result.values

    @property
    def faithfulness(self) -> Float[Tensor, " circuit"]:
        """That of Hanna et al. 2024: the values with 0 at the fully ablated run and 1 at the clean one.

        `result.faithfulness_wang` has the other definition.

        Raises:
            HookLensError: both have the same value.
        """
        return self.result.faithfulness_hanna

    def smallest(self, fraction: float) -> Circuit:
        """The smallest circuit that was run whose faithfulness is at least `fraction`.

        Larger ones may fall below it again.

        Raises:
            HookLensError: none is.
        """
        for circuit, found in zip(self.circuits, self.faithfulness.tolist(), strict=True):
            if found >= fraction:
                return circuit
        raise HookLensError(
            f"no circuit of the curve reaches a faithfulness of {fraction}: the highest is "
            f"{float(self.faithfulness.max()):.3f}, of circuits with {self.sizes[0]} to {self.sizes[-1]} edges"
        )

    def area(self, *, scale: Literal["log", "linear"] = "log") -> float:
        """The area under the curve from the smallest to the largest circuit, as the mean faithfulness.

        Args:
            scale: `"log"`: over the logarithm of the number of edges, so that each doubling counts alike and small
                circuits matter; `"linear"`: over the number itself.

        Raises:
            HookLensError: fewer than two circuits with edges, or an unknown scale.
        """
        if scale not in ("log", "linear"):
            raise HookLensError(f"area: scale is {scale!r}; expected 'log' or 'linear'")
        points = [
            (math.log(size) if scale == "log" else float(size), found)
            for size, found in zip(self.sizes, self.faithfulness.tolist(), strict=True)
            if size > 0
        ]
        if len(points) < 2:
            raise HookLensError(f"area: a curve of {len(points)} circuits with edges has no area; give two sizes")
        pieces: list[float] = [(x - w) * (f + g) / 2 for (w, g), (x, f) in pairwise(points)]
        return sum(pieces) / (points[-1][0] - points[0][0])

    def to_dataframe(self, *, statistics: Sequence[Statistic] = ()) -> "pandas.DataFrame":
        """One row per circuit, as `CircuitResult.to_dataframe` gives, without labels, which are the sizes.

        Args:
            statistics: what else to give, as there.

        Raises:
            HookLensError, MissingDependencyError: as there.
        """
        return self.result.to_dataframe(statistics=statistics).drop(columns="circuit")

    def save(self, path: str | Path) -> None:
        """Write the result, circuits and all, to a safetensors file, whole or not at all."""
        self.result.save(path)

    @classmethod
    def load(cls, path: str | Path) -> "FaithfulnessCurve":
        """Read what `save` wrote.

        Raises:
            CheckpointError: as `CircuitResult.load`.
        """
        return cls(result=CircuitResult.load(path))

    def plot(
        self,
        *,
        backend: Backend = "plotly",
        title: str | None = None,
        interval: Literal["standard_error", "bootstrap"] | None = None,
    ) -> Any:
        """Faithfulness over the number of edges, on a logarithmic axis.

        Args:
            backend: the package that draws.
            title: what stands above; None: the metric.
            interval: draw bars of one standard error to either side, or of the 95 % bootstrap interval.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend or interval, runs that do not differ, or an interval of one pair.
        """
        drawn = [index for index, size in enumerate(self.sizes) if size]
        found, ends = self.faithfulness, None
        if interval is not None:
            low, high = self._ends_of(interval)
            ends = low[drawn].tolist(), high[drawn].tolist()
        return draw_curve(
            [self.sizes[index] for index in drawn],
            found[drawn].tolist(),
            ends=ends,
            labels=("edges", "faithfulness (Hanna et al. 2024)"),
            level=1.0,
            backend=backend,
            title=f"{self.result.metric}, fraction kept by the strongest edges" if title is None else title,
        )

    def _ends_of(self, interval: str) -> tuple[Tensor, Tensor]:
        """The ends of bars around each faithfulness."""
        options = ("standard_error", "bootstrap")
        if read_one_of(interval, what="plot: interval", options=options, error=HookLensError) == "bootstrap":
            return self.result.bootstrap_faithfulness("hanna")
        if self.result.per_pair.shape[-1] < 2:
            raise HookLensError("plot: a standard error needs at least two pairs; the result has 1")
        errors = self.result.faithfulness_hanna_errors
        return self.faithfulness - errors, self.faithfulness + errors


@overload
def faithfulness_curve(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Prompt | None = None,
    scores: EdgeScores | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    sizes: Sequence[int] | None = None,
    connected: bool = True,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> FaithfulnessCurve: ...
@overload
def faithfulness_curve(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Prompt | None = None,
    scores: EdgeScores | None = None,
    metric: Mapping[str, Metric | MetricFunction] | None = None,
    *,
    sizes: Sequence[int] | None = None,
    connected: bool = True,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> Results[FaithfulnessCurve]: ...
def faithfulness_curve(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Prompt | None = None,
    scores: EdgeScores | None = None,
    metric: Metrics | None = None,
    *,
    sizes: Sequence[int] | None = None,
    connected: bool = True,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> FaithfulnessCurve | Results[FaithfulnessCurve]:
    """Run the circuits of the strongest edges, more and more of them.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths.
        scores: of `edge_attribution`, on these prompts or others.
        metric: as for a sweep; several by name give a curve for each.
        sizes: numbers of edges; None: twenty from 1 to all, evenly spaced on a logarithmic scale.
        connected: choose edges from the logits backwards, see `EdgeScores.circuit`; False: simply the strongest.
        ablation, batch_size, attention_mask, edits, progress, allow_training: as for `evaluate_circuits`.

    Raises:
        InputError: a size below 0 or above the number of edges, all of which are named; or other scores.
        SiteError, MetricError, SweepInterruptedError: as for `evaluate_circuits`.
    """
    refuse_missing("faithfulness_curve", scores=scores, metric=metric)
    if not isinstance(scores, EdgeScores):
        raise InputError(
            f"faithfulness_curve: scores are a {type(scores).__name__}; expected those of edge_attribution"
        )
    n_edges = int(scores.exists.sum())
    chosen = _log_sizes(n_edges) if sizes is None else _read_sizes(sizes)
    outside = [size for size in chosen if not 0 <= size <= n_edges]
    if outside or not chosen:
        raise InputError(
            f"faithfulness_curve: sizes {outside or chosen}; expected numbers of edges from 0 to {n_edges}"
        )
    circuits = {size: scores.circuit(size, connected=connected) for size in chosen}
    assert metric is not None
    measured = MetricGroup.read(metric)
    results = evaluate_circuits(
        model,
        clean,
        corrupted,
        circuits,
        measured.metrics,
        ablation=ablation,
        batch_size=batch_size,
        attention_mask=attention_mask,
        edits=edits,
        progress=progress,
        allow_training=allow_training,
    )
    curves = {name: FaithfulnessCurve(result=one) for name, one in results.items()}
    return next(iter(curves.values())) if measured.is_single else Results(curves)


def _read_sizes(sizes: object) -> list[int]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise InputError(f"faithfulness_curve: sizes are {show(sizes)}; expected a list of numbers of edges")
    return sorted({read_int(size, what="faithfulness_curve: a size") for size in sizes})


def _log_sizes(n_edges: int) -> list[int]:
    exponents = torch.linspace(0.0, math.log(n_edges), _N_SIZES, dtype=torch.float64)
    return sorted({round(size) for size in exponents.exp().tolist()})
