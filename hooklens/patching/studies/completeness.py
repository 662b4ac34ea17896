"""Completeness: whether a circuit behaves as the network does when the same parts are taken out of both.

With `F` the metric, `C` the circuit, `M` the network and `K` a set of parts of the circuit (Wang et al. 2022,
"Interpretability in the Wild", section 4),

    incompleteness(K) = | F(C without K) - F(M without K) |

is small for every `K` where the circuit is complete. A faithful circuit can lack a part that steps in when another is
gone, a backup: with `K` empty nothing shows. There are too many sets to try, so some are drawn at random, some given
(the classes of heads that one tells apart), and some searched for greedily, part by part that makes it largest.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_int, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import CheckpointError
from hooklens.optional import import_package
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.result import CircuitResult
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.metrics.function import MetricFunction
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.results.statistics import standard_error
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import refuse_missing
from hooklens.patching.studies.parts import Part, Parts, Unit, evaluate_distinct
from hooklens.viz.charts import Backend, draw_lines

if TYPE_CHECKING:
    import pandas

_CIRCUIT, _NETWORK = "circuit: ", "network: "
_WHOLE = "nothing"
_SHOWN = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Completeness(Displayed):
    """A circuit and the network without the same parts.

    Attributes:
        circuit: the circuit without each set of parts; its labels name the sets, the first of which is empty.
        network: the network without them, in the same order.
    """

    circuit: CircuitResult
    network: CircuitResult

    @property
    def sets(self) -> tuple[int | str, ...]:
        """The names of the sets."""
        return self.circuit.labels

    @property
    def incompleteness(self) -> Float[Tensor, " set"]:
        """`abs(F(C without K) - F(M without K))` of means over pairs, in the metric's units."""
        return (self.circuit.values - self.network.values).abs()

    @property
    def incompleteness_errors(self) -> Float[Tensor, " set"]:
        """Standard errors of the differences, pair by pair; NaN for a single pair."""
        differences = self.circuit.per_pair - self.network.per_pair
        if differences.shape[-1] < 2:
            return torch.full_like(differences[:, 0], torch.nan)
        return standard_error(differences)

    @property
    def worst(self) -> int | str:
        """The name of the set with the largest incompleteness."""
        return self.sets[int(self.incompleteness.argmax())]

    def _summary(self) -> Summary:
        worst = self.sets.index(self.worst)
        order = self.incompleteness.argsort(descending=True, stable=True)[:_SHOWN].tolist()
        values = (self.circuit.values, self.network.values, self.incompleteness)
        return Summary(
            title=(
                f"Completeness({len(self.sets)} sets, {self.circuit.metric}; largest incompleteness "
                f"{float(self.incompleteness[worst]):.4g}, without {self.worst})"
            ),
            listing=Listing(
                columns=("without", "circuit", "network", "incompleteness"),
                rows=[(str(self.sets[row]), *(float(found[row]) for found in values)) for row in order],
                what="sets",
                n_rows=len(self.sets),
            ),
        )

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per set: its name, the edges taken out of the circuit, both values, and the incompleteness."""
        whole = len(self.circuit.circuits[0])
        columns = {
            "set": self.sets,
            "edges_removed": [whole - len(circuit) for circuit in self.circuit.circuits],
            "circuit": self.circuit.values.tolist(),
            "network": self.network.values.tolist(),
            "incompleteness": self.incompleteness.tolist(),
            "standard_error": self.incompleteness_errors.tolist(),
        }
        table: pandas.DataFrame = import_package("pandas").DataFrame(columns)
        return table

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """The metric of the circuit and of the network, set by set.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend.
        """
        lines = {"circuit": self.circuit.values.tolist(), "network": self.network.values.tolist()}
        heading = "Completeness (Wang et al. 2022)" if title is None else title
        names = [str(name) for name in self.sets]
        return draw_lines(("without", names), {self.circuit.metric: lines}, backend=backend, title=heading)

    def save(self, path: str | Path) -> None:
        """Write the result to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        rows = range(len(self.sets))
        circuit = self.circuit.take(rows, labels=[f"{_CIRCUIT}{name}" for name in self.sets])
        circuit.followed_by(self.network.take(rows, labels=[f"{_NETWORK}{name}" for name in self.sets])).save(path)

    @classmethod
    def load(cls, path: str | Path) -> "Completeness":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or holds something else.
        """
        whole = CircuitResult.load(path)
        half = len(whole.labels) // 2
        names = [str(label).removeprefix(_CIRCUIT) for label in whole.labels[:half]]
        expected = (*(f"{_CIRCUIT}{name}" for name in names), *(f"{_NETWORK}{name}" for name in names))
        if whole.labels != expected:
            raise CheckpointError(f"{path} does not hold a completeness; expected a file that Completeness.save wrote")
        rows = range(half)
        return cls(
            circuit=whole.take(rows, labels=names), network=whole.take([row + half for row in rows], labels=names)
        )


@reads()
def completeness(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    circuit: Circuit | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    unit: Unit = "nodes",
    sets: Mapping[str, Iterable[Part]] | None = None,
    n_random: int = 10,
    greedy_steps: int = 0,
    seed: int = 0,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> Completeness:
    """Take the same parts out of a circuit and of the network, and compare what is left.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        circuit: the circuit.
        metric: as for a sweep.
        unit: `"nodes"`: parts are heads, MLPs and the embeddings (`"a0.h1"`, `"m0"`, `"embed"`), taken out with all
            edges that leave them; `"edges"`: single edges, `"a0.h1 -> logits"`.
        sets: sets of parts to take out, by name.
        n_random: how many sets are drawn besides, each part with probability 1/2.
        greedy_steps: parts to add one after another, each time the one that makes the incompleteness largest; each
            step runs twice as many circuits as there are parts, and its set is one of the result's.
        seed: of the draws.
        ablation, batch_size, attention_mask, progress, allow_training: as for `evaluate_circuits`.

    Raises:
        InputError: numbers or sets that are none, or an empty circuit.
        SiteError: parts that the circuit has not, or edges that the network has not.
        MetricError, SweepInterruptedError: as for `evaluate_circuits`.
    """
    refuse_missing("completeness", circuit=circuit, metric=metric)
    assert circuit is not None
    parts = Parts(circuit, model.cfg, unit, what="completeness")
    chosen: dict[str, tuple[Part, ...]] = {_WHOLE: (), **parts.read_sets(sets)}
    drawn = read_int(n_random, what="completeness: n_random", least=0)
    steps = read_int(greedy_steps, what="completeness: greedy_steps", least=0, most=len(parts.names))
    chosen |= parts.draw_sets(drawn, read_seed(seed, what="completeness: seed"))
    read = read_all_pairs(model, clean, corrupted, attention_mask)
    prompts = (read, None)
    options = {"ablation": ablation, "batch_size": batch_size, "progress": progress, "allow_training": allow_training}

    def both(some: Mapping[str, tuple[Part, ...]]) -> Completeness:
        circuits = [parts.left(one, of_network=whole) for whole in (False, True) for one in some.values()]
        found = evaluate_distinct(model, prompts, circuits, metric, options)
        n_sets = len(some)
        return Completeness(
            circuit=found.take(range(n_sets), labels=some),
            network=found.take(range(n_sets, 2 * n_sets), labels=some),
        )

    removed: tuple[Part, ...] = ()
    for step in range(steps):
        candidates = {name: (*removed, name) for name in parts.names if name not in removed}
        removed = candidates[str(both(candidates).worst)]
        chosen[f"greedy {step + 1}: {removed[-1]}"] = removed
    return both(chosen)
