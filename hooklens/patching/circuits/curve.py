"""The faithfulness curve: how much of a behaviour circuits of growing size keep.

Edges are ranked by their scores, and the circuits of the first 1, 2, 4, ... of them are run with the rest ablated
(Hanna et al. 2024, by whose definition faithfulness is shown; `faithfulness` says what goes with such a number). A
behaviour that few edges carry shows as a curve that reaches 1 early. Curves compare rankings, too: the better ranking
has the larger area (Mueller et al. 2025, "MIB").

Beside it stand circuits of equal size drawn at random. Where they are as faithful, the ablation or the prompts leave
the behaviour to any edges, and a high number says nothing of the scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_one_of, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Summary
from hooklens.errors import CheckpointError, HookLensError, InputError
from hooklens.hooks.edits import Edit
from hooklens.patching.choices.chance import random_circuits
from hooklens.patching.choices.choice import EdgeChoice, read_choice
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.faithfulness import evaluate_circuits
from hooklens.patching.circuits.result import CircuitResult
from hooklens.patching.circuits.sizes import MIB_LABELS, choose_circuits
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.metrics.function import MetricFunction
from hooklens.patching.metrics.group import MetricGroup, Metrics
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.mib.measures import circuit_model_distance, circuit_performance_ratio
from hooklens.patching.pairs.loader import Pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.results.edge_scores import EdgeScores
from hooklens.patching.results.over_pairs import Statistic
from hooklens.patching.results.several import Results
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import refuse_missing
from hooklens.viz.charts import Backend, draw_curve
from hooklens.viz.plots.curves import Curves, curves

if TYPE_CHECKING:
    import pandas

_RANDOM = "random "


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class FaithfulnessCurve(Displayed):
    """Circuits of growing size, and how faithful they are.

    Attributes:
        result: the circuits, the smallest first, and their values; its `stats` say what they took, with those drawn at
            random, and without what occurs twice.
        random: circuits of the same sizes drawn at random, draw by draw; None: none were.
    """

    result: CircuitResult
    random: CircuitResult | None = None

    def _summary(self) -> Summary:
        of_circuits = self.result._summary()
        n_draws = 0 if self.random is None else len(self.random.labels) // max(1, len(self.circuits))
        return replace(
            of_circuits,
            title=(
                f"FaithfulnessCurve: {self.result.metric} of {len(self.circuits)} circuits, {self.result.ablation} "
                "ablation"
            ),
            facts={**of_circuits.facts, "drawn at random": f"{n_draws} of each size" if n_draws else None},
            # A line needs two places, and one value at each.
            pages=[self._draw] if len(set(self.sizes)) == len(self.circuits) > 1 else [],
        )

    def _draw(self) -> Curves:
        """The metric over the number of edges, with the mean of circuits drawn at random, from lowest to highest."""
        lines, bands = {"circuits": self.values}, {}
        if self.random is not None and len(self.circuits):
            draws = self.random.values.view(-1, len(self.circuits))
            lines["drawn at random"] = draws.mean(0)
            bands["drawn at random"] = (draws.amin(0), draws.amax(0))
        return curves(
            lines,
            list(map(float, self.sizes)),
            x_name="edges",
            y_name=self.result.metric,
            bands=bands,
            title=f"{self.result.metric} by the number of edges",
        )

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

    @property
    def random_faithfulness(self) -> Float[Tensor, "draw circuit"]:
        """That of the circuits drawn at random.

        Raises:
            HookLensError: none were, or as `faithfulness`.
        """
        if self.random is None:
            raise HookLensError(
                "this curve has no random circuits beside it; run faithfulness_curve with random_draws=3"
            )
        return self.random.faithfulness_hanna.view(-1, len(self.circuits))

    @property
    def cpr(self) -> float:
        """MIB's circuit performance ratio, the area under the curve over the fraction of edges; see `mib.measures`.

        It asks how well circuits do what the network is good at, so edges are to be chosen with
        `EdgeChoice(by="signed")`.

        Raises:
            HookLensError: the curve is not over MIB's ten sizes, or as `faithfulness`.
        """
        return circuit_performance_ratio(self._at_mib_sizes(self.faithfulness))

    @property
    def cmd(self) -> float:
        """MIB's circuit-model distance, the area between the curve and 1; see `mib.measures`.

        It asks how near circuits are to the network, so edges are to be chosen by absolute scores.

        Raises:
            HookLensError: as `cpr`.
        """
        return circuit_model_distance(self._at_mib_sizes(self.faithfulness))

    @property
    def random_cpr(self) -> tuple[float, ...]:
        """The circuit performance ratio of each random draw.

        Raises:
            HookLensError: as `cpr` and `random_faithfulness`.
        """
        return tuple(circuit_performance_ratio(self._at_mib_sizes(draw)) for draw in self.random_faithfulness)

    @property
    def random_cmd(self) -> tuple[float, ...]:
        """The circuit-model distance of each random draw.

        Raises:
            HookLensError: as `cpr` and `random_faithfulness`.
        """
        return tuple(circuit_model_distance(self._at_mib_sizes(draw)) for draw in self.random_faithfulness)

    def _at_mib_sizes(self, faithfulness: Float[Tensor, " circuit"]) -> list[float]:
        if self.result.labels != MIB_LABELS:
            raise HookLensError(
                "MIB's measures are of circuits with ten given fractions of all edges, and this curve has others; run "
                "faithfulness_curve with sizes='mib'"
            )
        found: list[float] = faithfulness.tolist()
        return found

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

        Random circuits give the columns `random_mean`, `random_low` and `random_high`: the mean and the ends of their
        faithfulness by Hanna's definition over draws, where there is a scale.

        Args:
            statistics: what else to give, as there.

        Raises:
            HookLensError, MissingDependencyError: as there.
        """
        table = self.result.to_dataframe(statistics=statistics).drop(columns="circuit")
        if self.random is not None and self.result.full != self.result.empty:
            drawn = self.random_faithfulness
            table["random_mean"] = drawn.mean(0).tolist()
            table["random_low"], table["random_high"] = drawn.amin(0).tolist(), drawn.amax(0).tolist()
        return table

    def save(self, path: str | Path) -> None:
        """Write the result, circuits and all, to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        self._whole.save(path)

    @property
    def _whole(self) -> CircuitResult:
        """The circuits with those drawn at random behind them."""
        return self.result if self.random is None else self.result.followed_by(self.random)

    @classmethod
    def load(cls, path: str | Path) -> "FaithfulnessCurve":
        """Read what `save` wrote.

        Raises:
            CheckpointError: as `CircuitResult.load`.
        """
        whole = CircuitResult.load(path)
        drawn = [row for row, label in enumerate(whole.labels) if str(label).startswith(_RANDOM)]
        own = [row for row in range(len(whole.labels)) if row not in set(drawn)]
        if len(drawn) % max(len(own), 1):
            raise CheckpointError(
                f"{path} is damaged: it holds {len(own)} circuits of a curve and {len(drawn)} random ones, expected "
                "as many of these for each draw"
            )
        return cls(result=whole.take(own), random=whole.take(drawn) if drawn else None)

    def plot(
        self,
        *,
        backend: Backend = "plotly",
        title: str | None = None,
        interval: Literal["standard_error", "bootstrap"] | None = None,
    ) -> Any:
        """Faithfulness over the number of edges, on a logarithmic axis, and a band from the lowest to the highest draw.

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
            band=self._band(drawn),
            labels=("edges", "faithfulness (Hanna et al. 2024)"),
            level=1.0,
            backend=backend,
            title=f"{self.result.metric}, fraction kept by the strongest edges" if title is None else title,
        )

    def _band(self, drawn: list[int]) -> tuple[str, list[float], list[float]] | None:
        """What stands beside the band of random circuits, and its ends."""
        if self.random is None:
            return None
        found = self.random_faithfulness[:, drawn]
        return f"random circuits, {len(found)} draws", found.amin(0).tolist(), found.amax(0).tolist()

    def _ends_of(self, interval: str) -> tuple[Tensor, Tensor]:
        """The ends of bars around each faithfulness."""
        options = ("standard_error", "bootstrap")
        if read_one_of(interval, what="plot: interval", options=options, error=HookLensError) == "bootstrap":
            return self.result.bootstrap_faithfulness("hanna")
        if self.result.per_pair.shape[-1] < 2:
            raise HookLensError("plot: a standard error needs at least two pairs; the result has 1")
        errors = self.result.faithfulness_hanna_errors
        return self.faithfulness - errors, self.faithfulness + errors


if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hooklens.patching.circuits.faithfulness import CircuitKeywords

    class CurveKeywords(CircuitKeywords, total=False):
        """The keywords of a curve of circuits."""

        sizes: Sequence[int] | Literal["mib"] | None
        connected: bool
        choice: EdgeChoice | None
        random_draws: int
        seed: int


if TYPE_CHECKING:

    @overload
    def faithfulness_curve(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        scores: EdgeScores | ScoredEdges | None = ...,
        metric: Metric | MetricFunction | None = ...,
        **options: Unpack[CurveKeywords],
    ) -> FaithfulnessCurve: ...
    @overload
    def faithfulness_curve(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None = ...,
        scores: EdgeScores | ScoredEdges | None = ...,
        *,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[CurveKeywords],
    ) -> Results[FaithfulnessCurve]: ...
    @overload
    def faithfulness_curve(
        model: HookedCausalLM,
        clean: Pairs,
        corrupted: Corrupted | None,
        scores: EdgeScores | ScoredEdges | None,
        metric: Mapping[str, Metric | MetricFunction],
        **options: Unpack[CurveKeywords],
    ) -> Results[FaithfulnessCurve]: ...


@reads()
def faithfulness_curve(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    scores: EdgeScores | ScoredEdges | None = None,
    metric: Metrics | None = None,
    *,
    sizes: Sequence[int] | Literal["mib"] | None = None,
    connected: bool = True,
    choice: EdgeChoice | None = None,
    random_draws: int = 3,
    seed: int = 0,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> FaithfulnessCurve | Results[FaithfulnessCurve]:
    """Run the circuits of the strongest edges, more and more of them, and random ones of the same sizes.

    Scores that were measured on the prompts of the curve make it look better than it is on others;
    `held_out_curve` splits them.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        scores: of `edge_attribution`, on these prompts or others, or of anything else.
        metric: as for a sweep; several by name give a curve for each.
        sizes: numbers of edges; `"mib"`: the ten fractions of all edges that `cpr` and `cmd` are defined by; None:
            twenty from 1 to all, evenly spaced on a logarithmic scale.
        connected: choose edges from the logits backwards, see `EdgeScores.circuit`; False: simply the strongest.
        choice: another way to choose, in place of `connected`.
        random_draws: how many times circuits of the same sizes are drawn at random, connected as the choice connects;
            0: none. Each draw costs about as much as the curve itself.
        seed: of the draws.
        ablation, batch_size, attention_mask, edits, progress, allow_training: as for `evaluate_circuits`.

    Raises:
        InputError: a size below 0 or above the number of edges, all of which are named; or other scores.
        SiteError, MetricError, SweepInterruptedError: as for `evaluate_circuits`.
        HookLensError: as `EdgeScores.circuit`.
    """
    refuse_missing("faithfulness_curve", scores=scores, metric=metric)
    if not isinstance(scores, EdgeScores | ScoredEdges):
        raise InputError(
            f"faithfulness_curve: scores are a {type(scores).__name__}; expected those of edge_attribution, or "
            "ScoredEdges"
        )
    made = read_choice(choice, connected=connected, what="faithfulness_curve")
    draws = read_int(random_draws, what="faithfulness_curve: random_draws", least=0)
    first = read_seed(seed, what="faithfulness_curve: seed")
    labelled = choose_circuits(scores, made, sizes)
    table = scores.edges if isinstance(scores, EdgeScores) else scores
    # Circuits of a choice that prunes have fewer edges than asked for; those beside them have as many as they have.
    counts = [len(circuit) for circuit in labelled.values()]
    drawn = {
        f"{_RANDOM}{draw}: {label}": circuit
        for draw in range(draws)
        for label, circuit in zip(labelled, random_circuits(table, counts, choice=made, seed=first + draw), strict=True)
    }
    distinct = list(dict.fromkeys([*labelled.values(), *drawn.values()]))
    assert metric is not None
    measured = MetricGroup.read(metric)
    results = evaluate_circuits(
        model,
        clean,
        corrupted,
        distinct,
        measured.metrics,
        ablation=ablation,
        batch_size=batch_size,
        attention_mask=attention_mask,
        edits=edits,
        progress=progress,
        allow_training=allow_training,
    )
    row = {circuit: index for index, circuit in enumerate(distinct)}
    curves = {
        name: FaithfulnessCurve(
            result=found.take([row[circuit] for circuit in labelled.values()], labels=labelled),
            random=found.take([row[circuit] for circuit in drawn.values()], labels=drawn) if drawn else None,
        )
        for name, found in results.items()
    }
    return next(iter(curves.values())) if measured.is_single else Results(curves)
