"""A score for every edge of a network, wherever it comes from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import read_int, require
from hooklens.config import HookedConfig
from hooklens.display import Displayed, Listing, Picture, Summary
from hooklens.errors import InputError, join_names
from hooklens.optional import import_package
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Edge, Graph, inputs_of, split_writer
from hooklens.viz.excerpt import thumbnail

if TYPE_CHECKING:
    import pandas

_SHOWN = 100


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ScoredEdges(Displayed):
    """Scores of edges: those of a file, of a learned mask, of chance, or of `edge_attribution` (`EdgeScores.edges`).

    Attributes:
        scores: `[writer reader]`; above 0 for an edge that works for the behaviour, below for one that works against
            it; 0 where there is no edge. NaN counts as 0 in every choice.
        writers, readers: the nodes, in the order in which they write and read.
        exists: `[writer reader]`, where there is an edge.
    """

    scores: Float[Tensor, "writer reader"]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    exists: Bool[Tensor, "writer reader"]

    @classmethod
    def of(cls, cfg: HookedConfig, scores: Mapping[Edge, float]) -> "ScoredEdges":
        """The scores of some edges of a network, and 0 for all others.

        Args:
            cfg: the network's config.
            scores: by edge, as (writer, reader).

        Raises:
            InputError: no mapping.
            SiteError: edges that the network has not; all of them are named.
        """
        require(
            scores,
            kind=Mapping,
            what="ScoredEdges.of: scores",
            expected="a mapping from edge (writer, reader) to number",
        )
        Circuit(scores).check(cfg)
        graph = Graph.of(cfg)
        writers, readers = tuple(map(str, graph.writers)), tuple(map(str, graph.readers))
        row = {name: index for index, name in enumerate(writers)}
        column = {name: index for index, name in enumerate(readers)}
        table = torch.zeros(len(writers), len(readers), dtype=torch.float64)
        for (writer, reader), score in scores.items():
            table[row[writer], column[reader]] = float(score)
        return cls(scores=table, writers=writers, readers=readers, exists=graph.exists().T)

    @property
    def n_edges(self) -> int:
        """Edges of the network."""
        return int(self.exists.sum())

    def by_edge(self) -> dict[Edge, float]:
        """The score of every edge, writer by writer."""
        table = self.scores.tolist()
        return {
            (self.writers[row], self.readers[column]): table[row][column]
            for row, column in self.exists.nonzero().tolist()
        }

    @property
    def inputs(self) -> dict[str, list[str]]:
        """By the name of each writer the readers that it is made from."""
        n_keys = sum(name.endswith(".k") for name in self.readers)
        group_size = sum(name.endswith(".q") for name in self.readers) // n_keys if n_keys else 1
        return {
            name: [str(one) for one in inputs_of(split_writer(name), group_size=group_size)] for name in self.writers
        }

    @property
    def node_scores(self) -> dict[str, float]:
        """By writer, the sum of the scores of the edges that leave it.

        Scores by a gradient add up: this is what attribution gives a node whose output is ablated for all readers at
        once, since the stream is a sum.
        """
        total = self.scores.nan_to_num(0.0).masked_fill(~self.exists, 0.0).sum(1)
        return dict(zip(self.writers, total.tolist(), strict=True))

    def node_circuit(self, k: int, *, signed: bool = False) -> Circuit:
        """All edges that leave the `k` strongest nodes, by the absolute value of `node_scores` unless `signed`.

        Raises:
            InputError: no number of nodes.
        """
        size = read_int(k, what="node_circuit: k", least=0)
        found = self.node_scores
        ranked = sorted(found, key=lambda name: found[name] if signed else abs(found[name]), reverse=True)
        chosen = set(ranked[:size])
        return Circuit(edge for edge in self.top(self.n_edges) if edge[0] in chosen)

    def __getitem__(self, edge: Edge) -> float:
        writer, reader = edge
        unknown = [name for name, known in ((writer, self.writers), (reader, self.readers)) if name not in known]
        if unknown:
            raise SiteError(
                f"no edge {writer!r} -> {reader!r}: {unknown} is no node here; writers are {join_names(self.writers)}, "
                f"readers {join_names(self.readers)}"
            )
        return float(self.scores[self.writers.index(writer), self.readers.index(reader)])

    def _summary(self) -> Summary:
        return Summary(
            title=f"ScoredEdges({self.n_edges} edges, {int((self.scores != 0).sum())} with a score other than 0)",
            listing=self.listing(),
            pages=[self._draw_small],
        )

    def listing(self) -> Listing:
        """The edges with the largest scores, for a display."""
        return Listing(
            columns=("writer", "reader", "score"),
            rows=[(*edge, self[edge]) for edge in self.top(_SHOWN)],
            what="edges",
            caption="edges with the largest scores",
            n_rows=self.n_edges,
            more="scores.by_edge() has all",
        )

    def _draw_small(self) -> Picture:
        return thumbnail(
            self.scores.masked_fill(~self.exists, torch.nan)[None],
            rows=("writer", self.writers),
            columns=("reader", self.readers),
            title="scores of edges",
            more="scores.by_edge() has all",
        )

    def strength(self, *, signed: bool) -> Float[Tensor, "writer reader"]:
        """What edges are ordered by: scores or their absolute values, minus infinity where there is no edge."""
        scores = self.scores.nan_to_num(0.0)
        return (scores if signed else scores.abs()).masked_fill(~self.exists, -torch.inf)

    def top(self, k: int, *, signed: bool = False) -> list[Edge]:
        """The `k` edges with the largest scores, by absolute value unless `signed`, as (writer, reader).

        Of equal ones the first in the table comes first.

        Raises:
            InputError: no number of edges.
        """
        read_int(k, what="top: k", least=0)
        order = self.strength(signed=signed).flatten().argsort(descending=True, stable=True)
        n_readers = len(self.readers)
        return [
            (self.writers[index // n_readers], self.readers[index % n_readers])
            for index in order[: min(k, self.n_edges)].tolist()
        ]

    def to_mask(self, circuit: Circuit) -> Bool[Tensor, "writer reader"]:
        """Which of the edges a circuit holds.

        Raises:
            InputError: no circuit.
            SiteError: it has edges that are none here; all of them are named.
        """
        require(circuit, kind=Circuit, what="circuit", expected="a Circuit", error=InputError)
        row = {name: index for index, name in enumerate(self.writers)}
        column = {name: index for index, name in enumerate(self.readers)}
        mask = torch.zeros_like(self.exists)
        missing = []
        for writer, reader in circuit:
            if writer in row and reader in column and self.exists[row[writer], column[reader]]:
                mask[row[writer], column[reader]] = True
            else:
                missing.append(f"{writer} -> {reader}")
        if missing:
            raise SiteError(
                f"the circuit has edges that were not scored, for they are none here: {join_names(missing)}"
            )
        return mask

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per edge, the strongest first: writer, reader, score."""
        scores = self.by_edge()
        rows = [(*edge, scores[edge]) for edge in self.top(self.n_edges)]
        table: pandas.DataFrame = import_package("pandas").DataFrame(rows, columns=["writer", "reader", "score"])
        return table
