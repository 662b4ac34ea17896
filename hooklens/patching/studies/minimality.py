"""Minimality: whether a circuit has parts that it does not need.

With `F` the metric, `C` the circuit and `K` a set of its parts without `v` (Wang et al. 2022, "Interpretability in the
Wild", section 4),

    minimality(v, K) = | F(C without K and v) - F(C without K) |

is large for some `K` where the part `v` is needed. With `K` empty a part that others stand in for shows nothing; so the
largest over several sets counts.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary, format_number
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.metrics.function import MetricFunction
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.results.file import NUMBER, TEXT, Expectation, Expected, ResultFile, is_list
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import refuse_missing
from hooklens.patching.studies.parts import Part, Parts, Unit, evaluate_distinct
from hooklens.viz.charts import Backend, draw_lines

if TYPE_CHECKING:
    import pandas

_SHOWN = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Minimality(Displayed):
    """By how much each part of a circuit moves the metric.

    Attributes:
        parts: the parts.
        sets: the names of the sets that were taken out beside them, the first of which is empty.
        changes: `[part set]`, `F(C without K and v) - F(C without K)`, averaged over pairs, in the metric's units.
        full: the metric of the whole network, averaged over pairs.
        metric: the metric's name.
    """

    parts: tuple[str, ...]
    sets: tuple[str, ...]
    changes: Float[Tensor, "part set"]
    full: float
    metric: str

    @property
    def scores(self) -> Float[Tensor, " part"]:
        """The largest change of each part over the sets, by absolute value."""
        return self.changes.abs().amax(1)

    @property
    def shares(self) -> Float[Tensor, " part"]:
        """The scores as shares of the network's metric, as Wang et al. show them.

        Raises:
            HookLensError: the network's metric is 0.
        """
        if self.full == 0:
            raise HookLensError(f"the network's {self.metric} is 0, of which there are no shares; scores have units")
        return self.scores / abs(self.full)

    def needless(self, threshold: float) -> tuple[str, ...]:
        """The parts that move the metric by less than a threshold, whatever was taken out beside them."""
        return tuple(part for part, score in zip(self.parts, self.scores.tolist(), strict=True) if score < threshold)

    def _summary(self) -> Summary:
        order = self.scores.argsort(stable=True)[:_SHOWN].tolist()
        return Summary(
            title=f"Minimality({len(self.parts)} parts, {len(self.sets)} sets, {self.metric}; the least needed first)",
            facts={"whole network": format_number(self.full)},
            listing=Listing(
                columns=("part", "score", "alone"),
                rows=[(self.parts[row], float(self.scores[row]), float(self.changes[row, 0])) for row in order],
                what="parts",
                n_rows=len(self.parts),
            ),
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per part, the most needed first: part, score, change alone, and the set where it counts most."""
        order = self.scores.argsort(descending=True, stable=True).tolist()
        columns = {
            "part": [self.parts[row] for row in order],
            "score": [float(self.scores[row]) for row in order],
            "alone": [float(self.changes[row, 0]) for row in order],
            "beside": [self.sets[int(self.changes[row].abs().argmax())] for row in order],
        }
        table: pandas.DataFrame = import_package("pandas").DataFrame(columns)
        return table

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """The score of each part.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        heading = "Minimality (Wang et al. 2022)" if title is None else title
        panels = {self.metric: {"largest change": self.scores.tolist(), "alone": self.changes[:, 0].abs().tolist()}}
        return draw_lines(("without", list(self.parts)), panels, backend=backend, title=heading)

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        _FILE.write(path, {"changes": self.changes}, {name: getattr(self, name) for name in _FILE.keys})

    @classmethod
    def load(cls, path: str | Path) -> "Minimality":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        return cls(
            parts=tuple(described["parts"]),
            sets=tuple(described["sets"]),
            changes=tensors["changes"],
            full=described["full"],
            metric=described["metric"],
        )


@reads()
def minimality(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    circuit: Circuit | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    unit: Unit = "nodes",
    sets: Mapping[str, Iterable[Part]] | None = None,
    n_random: int = 5,
    seed: int = 0,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> Minimality:
    """Take each part out of a circuit, alone and beside sets of others.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        circuit: the circuit.
        metric: as for a sweep.
        unit: what parts are, as for `completeness`.
        sets: sets of parts that are taken out beside each part, by name; the part itself does not count in them.
        n_random: how many sets are drawn besides, each part with probability 1/2.
        seed: of the draws.
        ablation, batch_size, attention_mask, progress, allow_training: as for `evaluate_circuits`.

    Raises:
        InputError, SiteError, MetricError, SweepInterruptedError: as for `completeness`.
    """
    refuse_missing("minimality", circuit=circuit, metric=metric)
    assert circuit is not None
    parts = Parts(circuit, model.cfg, unit, what="minimality")
    beside: dict[str, tuple[Part, ...]] = {"nothing": (), **parts.read_sets(sets)}
    drawn = read_int(n_random, what="minimality: n_random", least=0)
    beside |= parts.draw_sets(drawn, read_seed(seed, what="minimality: seed"))
    read = read_all_pairs(model, clean, corrupted, attention_mask)
    options = {"ablation": ablation, "batch_size": batch_size, "progress": progress, "allow_training": allow_training}
    circuits = [
        parts.left({*others} - {part} | extra)
        for part in parts.names
        for others in beside.values()
        for extra in (set(), {part})
    ]
    found = evaluate_distinct(model, (read, None), circuits, metric, options)
    with_part, without = found.values.view(len(parts.names), len(beside), 2).unbind(-1)
    return Minimality(
        parts=parts.names, sets=tuple(beside), changes=without - with_part, full=found.full, metric=found.metric
    )


_NAMES = Expected("a list of texts", lambda found: is_list(found, TEXT.holds))
_FILE = ResultFile(
    format="hooklens.patching.minimality-1",
    contents="the minimality of a circuit",
    writer="Minimality.save",
    keys={"parts": _NAMES, "sets": _NAMES, "full": NUMBER, "metric": TEXT},
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    return {"changes": Expectation((len(described["parts"]), len(described["sets"])))}
