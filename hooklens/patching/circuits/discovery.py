"""What a search for a circuit has found: the circuit, and how each edge was decided."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from jaxtyping import Bool
from torch import Tensor

from hooklens.display import Displayed, Summary, format_number
from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.graph.circuit import Circuit

if TYPE_CHECKING:
    import pandas

Verdict = Literal["kept", "removed", "unreachable"]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What became of one edge.

    Attributes:
        writer, reader: the edge.
        verdict: `"kept"`; `"removed"`: the damage without it grows by less than the threshold; `"unreachable"`:
            removed without a run, since nothing leads from its reader to the logits any more.
        damage: that of the circuit at this point without the edge; None for an unreachable one.
        increase: by how much that is more than with the edge.
    """

    writer: str
    reader: str
    verdict: Verdict
    damage: float | None = None
    increase: float | None = None


@dataclass(frozen=True, kw_only=True)
class DiscoveryStats:
    """What a search took, against one run per edge and pair.

    Attributes:
        edges: edges of the network.
        decided: edges decided.
        unreachable: those among them that were removed without a run.
        circuits_run: circuits run on all pairs of the search, those that turned out not to be needed included.
        forwards: passes through the model, those of the unpatched runs included.
        tokens: tokens run through all layers, or as many through some as comes to the same.
        naive_forwards: one per pair of the search and edge that is not unreachable, and the two unpatched runs; of
            each held-out pair one circuit and these two.
        naive_tokens: the tokens of those.
    """

    edges: int
    decided: int
    unreachable: int
    circuits_run: int
    forwards: int
    tokens: float
    naive_forwards: int
    naive_tokens: int


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class Discovery(Displayed):
    """A circuit found by `discover_circuit`.

    Attributes:
        circuit: the edges that were kept. Where the search was stopped, also those it had not come to.
        decisions: what became of each edge, in the order of the search.
        damage: the circuit's, averaged over the pairs that it was searched on.
        held_out_damage: the same of the pairs that the search has not seen: what is left of it elsewhere. None: no pair
            was held out, or the search was stopped before.
        held_out_pairs: which pairs these are.
        threshold: how much more damage an edge's removal could do.
        metric: the metric's name.
        stats: what it took.
    """

    circuit: Circuit
    decisions: tuple[Decision, ...] = field(repr=False)
    damage: float
    threshold: float
    metric: str
    stats: DiscoveryStats
    held_out_damage: float | None = None
    held_out_pairs: Bool[Tensor, " pair"]

    def _summary(self) -> Summary:
        stats = self.stats
        n_removed = sum(one.verdict == "removed" for one in self.decisions)
        return Summary(
            title=f"Discovery: {len(self.circuit):,} of {stats.edges:,} edges, {self.metric}",
            facts={
                "damage": f"{format_number(self.damage)} on the pairs of the search, {self._elsewhere}",
                "threshold": f"{format_number(self.threshold)} more damage for each edge removed",
                "decided": f"{stats.decided:,} edges: {n_removed:,} removed, {stats.unreachable:,} unreachable"
                + (f"; {stats.edges - stats.decided:,} were not come to" if stats.decided < stats.edges else ""),
                "took": f"{stats.circuits_run:,} circuits, {stats.forwards:,} forwards; one by one "
                f"{stats.naive_forwards:,}",
            },
            listing=self.circuit.edge_listing(),
            notes=["trace has what became of each edge"],
        )

    @property
    def _elsewhere(self) -> str:
        n_held_out = int(self.held_out_pairs.sum())
        if not n_held_out:
            return "none were held out"
        pairs = f"{n_held_out} held-out pair{'s' if n_held_out > 1 else ''}"
        return (
            f"{pairs} not measured"
            if self.held_out_damage is None
            else f"{format_number(self.held_out_damage)} on {pairs}"
        )

    @property
    def trace(self) -> "pandas.DataFrame":
        """One row per edge in the order of the search: writer, reader, verdict, damage, increase."""
        rows = [(each.writer, each.reader, each.verdict, each.damage, each.increase) for each in self.decisions]
        columns = ["writer", "reader", "verdict", "damage", "increase"]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=columns)
        return table.astype({"damage": "float64", "increase": "float64"})


class DiscoveryInterruptedError(HookLensError, RuntimeError):
    """A search for a circuit stopped before its end.

    Attributes:
        result: what it had decided; edges that it had not come to are still in the circuit.
    """

    def __init__(self, message: str, result: Discovery) -> None:
        super().__init__(message)
        self.result = result
