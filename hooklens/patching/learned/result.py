"""What was learned: a gate on every edge or node, how training went, and how faithful the circuit is."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_int
from hooklens.display import Displayed, Listing, Summary
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.circuits.result import CircuitResult
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.learned.gates import open_probability
from hooklens.patching.learned.level import Level
from hooklens.patching.results.edge_scores import EdgeScores
from hooklens.patching.results.file import (
    TEXT,
    WHOLE_NUMBER,
    Expectation,
    Expected,
    ResultFile,
    expect_numbers_of,
    is_list,
)
from hooklens.patching.results.moments import Moments
from hooklens.patching.results.over_pairs import Statistic
from hooklens.patching.results.result import SweepStats
from hooklens.viz.charts import Backend, draw_lines

if TYPE_CHECKING:
    import pandas

_SHOWN_STEPS = 25


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class LearnedCircuit(Displayed):
    """Gates on all edges of a network, trained to keep its behaviour with few of them open.

    Attributes:
        log_alpha: the gates' parameters, see `gates`; `-inf` where there is no edge, `inf` where an edge has no gate.
            The edges of a node's gate share one.
        writers, readers: the nodes, in the order in which they write and read.
        level: what has a gate: each `"edge"`, or each `"node"` (a head or an MLP) for all that it writes.
        size: how many edges or nodes `circuit()` takes: the target, or with a penalty the gates that are more likely
            open than not.
        losses: of each step, the loss in units of the run with everything ablated, without the price of open gates.
        sizes: of each step, the expected number of open gates.
        targets: of each step, the number that gates were pulled to; NaN with a penalty.
        held_out_pairs: which pairs were not trained on.
        values: the metric of `circuit()`, of the whole network and of the empty circuit, on all pairs; NaN where it
            was not measured.
        metric: the metric's name.
        ablation: what edges outside the circuit carried.
        method: how gates were held closed: `"lagrangian"` (edge pruning) or `"penalty"` (subnetwork probing).
        stats: what it took; steps count as cells.
    """

    log_alpha: Float[Tensor, "reader writer"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    level: Level
    size: int
    losses: Float[Tensor, " step"]
    sizes: Float[Tensor, " step"]
    targets: Float[Tensor, " step"]
    held_out_pairs: Bool[Tensor, " pair"]
    values: Float[Tensor, "run pair"]
    metric: str
    ablation: str
    method: str
    stats: SweepStats

    def _summary(self) -> Summary:
        rows = []
        for name, which in (("trained on", ~self.held_out_pairs), ("held out", self.held_out_pairs)):
            if bool(which.any()):
                rows.append((name, int(which.sum()), *self.values[:, which].mean(-1).tolist()))
        last = None
        if len(self.losses):
            last = f"{float(self.losses[-1]):.4f} of the ablated run's, {float(self.sizes[-1]):.1f} {self.level}s open"
        return Summary(
            title=(
                f"LearnedCircuit({self.size} of {self.n_gates} {self.level}s, by {self.method}, {self.ablation} "
                f"ablation, {len(self.losses)} steps)"
            ),
            facts={"metric": self.metric, "loss": last, "took": f"{self.stats.forwards:,} forwards"},
            listing=Listing(
                columns=("pairs", "number", "circuit", "network", "all ablated"),
                rows=rows,
                what="parts of the pairs",
                caption=f"{self.metric} of the circuit, of the network, and with everything ablated",
            ),
        )

    @property
    def n_gates(self) -> int:
        """How many gates there are."""
        exists = self.log_alpha > -torch.inf
        return int(exists.sum()) if self.level == "edge" else int(exists.any(0).sum()) - 1

    @property
    def probabilities(self) -> Float[Tensor, "reader writer"]:
        """How likely each edge's gate is open, in float64: gates far open would round to 1 in float32, all alike."""
        return open_probability(self.log_alpha.double())

    @property
    def scores(self) -> EdgeScores:
        """The probabilities as scores of edges, for `faithfulness_curve` and whatever else ranks edges.

        They are one value for all pairs, so they have no standard errors.
        """
        found = self.probabilities.T
        return EdgeScores(
            per_pair=None,
            moments=Moments(torch.stack([torch.ones_like(found), found, torch.zeros_like(found)])),
            writers=self.writers,
            readers=self.readers,
            exists=-torch.inf < self.log_alpha.T,
            clean_per_pair=self.values[1].double(),
            corrupted_per_pair=self.values[2].double(),
            metric=self.metric,
            method="learned",
            direction="noise",
            forwards=self.stats.forwards,
            tokens=self.stats.tokens,
        )

    def circuit(self, n: int | None = None, *, connected: bool = True) -> Circuit:
        """The circuit of the gates that are most likely open.

        Args:
            n: how many edges, or nodes where these have the gates; None: `size`.
            connected: of edges, take them from the logits backwards, see `EdgeScores.circuit`; False: simply the most
                likely.

        Returns:
            The edges; of nodes, all edges that lead away from them or from the embeddings.

        Raises:
            InputError: no number of edges or nodes.
        """
        chosen = self.size if n is None else read_int(n, what="LearnedCircuit.circuit: n", least=0)
        if self.level == "edge":
            return self.scores.circuit(chosen, connected=connected)
        kept = {self.writers[0], *self.ranked_nodes()[:chosen]}
        exists = (self.log_alpha > -torch.inf).nonzero().tolist()
        edges = [(self.writers[writer], self.readers[reader]) for reader, writer in exists]
        return Circuit(edge for edge in edges if edge[0] in kept)

    def ranked_nodes(self) -> list[str]:
        """Heads and MLPs, the one with the gate that is most likely open first; an edge's gate counts for its writer.

        What no edge leads away from has no gate that could be open, and comes last.
        """
        best = self.log_alpha.amax(0)[1:]
        return [self.writers[1 + index] for index in best.sort(descending=True, stable=True).indices.tolist()]

    @property
    def trained(self) -> CircuitResult:
        """The values of `circuit()` on the pairs that it was trained on.

        Raises:
            HookLensError: training stopped before they were measured.
        """
        return self._result(~self.held_out_pairs, "the pairs that it was trained on")

    @property
    def held_out(self) -> CircuitResult:
        """The values of `circuit()` on the pairs that it has not seen.

        Raises:
            HookLensError: there are none, or training stopped before they were measured.
        """
        return self._result(self.held_out_pairs, "held-out pairs")

    def _result(self, which: Bool[Tensor, " pair"], words: str) -> CircuitResult:
        values = self.values[:, which]
        if not values.numel():
            raise HookLensError(f"the learned circuit has no {words}; give learn_circuit a holdout, such as 0.25")
        if bool(values.isnan().any()):
            raise HookLensError(
                f"the learned circuit was not measured on {words}, since training stopped before; measure "
                "learned.circuit() with patching.evaluate_circuits"
            )
        return CircuitResult(
            circuits=(self.circuit(),),
            labels=(self.size,),
            per_pair=values[:1],
            full_per_pair=values[1],
            empty_per_pair=values[2],
            metric=self.metric,
            ablation=self.ablation,
            stats=self.stats,
        )

    @property
    def trace(self) -> "pandas.DataFrame":
        """One row per step: loss, expected number of open gates, target."""
        columns = {"loss": self.losses.tolist(), "size": self.sizes.tolist(), "target": self.targets.tolist()}
        table: pandas.DataFrame = import_package("pandas").DataFrame(columns)
        return table.rename_axis("step")

    def to_dataframe(self, *, statistics: Sequence[Statistic] = ()) -> "pandas.DataFrame":
        """One row per edge, the one most likely open first: writer, reader, and the probability as `score`.

        Args:
            statistics: as for `EdgeScores.to_dataframe`, which has none to give for one value of all pairs.

        Raises:
            HookLensError: any statistic.
        """
        if tuple(statistics):
            raise HookLensError(
                "a gate's probability is one value for all pairs, so no statistic over pairs exists; train with "
                "several seeds to see how far it varies"
            )
        return self.scores.to_dataframe().drop(columns="standard_error", errors="ignore")

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """Loss and number of open gates over the steps.

        Args:
            backend: the package that draws.
            title: what stands above; None: the metric and the size.

        Returns:
            A plotly or matplotlib figure.

        Raises:
            MissingDependencyError: the package is not installed.
            HookLensError: an unknown backend, or no step to draw.
        """
        n_steps = len(self.losses)
        if not n_steps:
            raise HookLensError("plot: the learned circuit has no steps, so there is nothing to draw")
        shown = sorted({round(place) for place in torch.linspace(0, n_steps - 1, min(n_steps, _SHOWN_STEPS)).tolist()})
        panels = {
            "loss (1: everything ablated)": {"loss": self.losses[shown].tolist()},
            f"open {self.level}s": {"expected": self.sizes[shown].tolist(), "target": self.targets[shown].tolist()},
        }
        heading = f"{self.metric}: learned circuit of {self.size} {self.level}s" if title is None else title
        return draw_lines(("step", [str(step) for step in shown]), panels, backend=backend, title=heading)

    def save(self, path: str | Path) -> None:
        """Write the learned circuit to a safetensors file, whole or not at all.

        Raises:
            CheckpointError: the file cannot be written.
        """
        described = {name: getattr(self, name) for name in _FILE.keys} | {"stats": asdict(self.stats)}
        _FILE.write(path, {name: getattr(self, name) for name in _TENSORS}, described)

    @classmethod
    def load(cls, path: str | Path) -> "LearnedCircuit":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no learned circuit.
        """
        tensors, described = _FILE.read(path, _expect_tensors)
        described.update(
            tensors,
            writers=tuple(described["writers"]),
            readers=tuple(described["readers"]),
            stats=SweepStats(**described["stats"]),
        )
        return cls(**described)


_TENSORS = ("log_alpha", "losses", "sizes", "targets", "held_out_pairs", "values")
_NODES = Expected("a list of texts", lambda found: is_list(found, TEXT.holds))
_FILE = ResultFile(
    format="hooklens.patching.learned-circuit-1",
    contents="a learned circuit",
    writer="LearnedCircuit.save",
    keys={
        "writers": _NODES,
        "readers": _NODES,
        "level": Expected("'edge' or 'node'", lambda found: TEXT.holds(found) and found in ("edge", "node")),
        "size": WHOLE_NUMBER,
        "metric": TEXT,
        "ablation": TEXT,
        "method": TEXT,
        "stats": expect_numbers_of(SweepStats),
    },
)


def _expect_tensors(described: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Expectation]:
    nodes = (len(described["readers"]), len(described["writers"]))
    return {
        "log_alpha": Expectation(nodes, torch.float32),
        "losses": Expectation(("step",), torch.float64),
        "sizes": Expectation(("step",), torch.float64),
        "targets": Expectation(("step",), torch.float64),
        "held_out_pairs": Expectation(("pair",), torch.bool),
        "values": Expectation((3, "pair")),
    }
