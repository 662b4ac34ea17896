"""Where gates are: one on every edge, or one on every head and MLP."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.patching.graph.nodes import Graph

Level = Literal["edge", "node"]


@dataclass(frozen=True)
class GateLayout:
    """The gates of a network, and which edges each of them closes.

    A node's gate is on all edges that lead away from it. The embeddings have none: without them no circuit gets to
    know its prompt.

    Attributes:
        level: what has a gate.
        exists: where there is an edge.
    """

    level: Level
    exists: Bool[Tensor, "reader writer"]

    @classmethod
    def of(cls, graph: Graph, level: Level) -> "GateLayout":
        """The gates of a graph."""
        return cls(level, graph.exists())

    def __len__(self) -> int:
        return int(self.exists.sum()) if self.level == "edge" else self.exists.shape[1] - 1

    def spread(
        self, gates: Float[Tensor, " gate"], *, closed: float = 0.0, fixed: float = 1.0
    ) -> Float[Tensor, "reader writer"]:
        """A value for each edge from one for each gate.

        Args:
            gates: the values.
            closed: what stands where there is no edge.
            fixed: what stands at edges that have no gate.
        """
        exists = self.exists.to(gates.device)
        if self.level == "edge":
            return gates.new_full(exists.shape, closed).masked_scatter(exists, gates)
        of_writers = torch.cat([gates.new_full((1,), fixed), gates]).expand(exists.shape)
        return of_writers.masked_fill(~exists, closed)

    def gather(self, table: Float[Tensor, "reader writer"]) -> Float[Tensor, " gate"]:
        """A value for each gate from one for each edge; of a node's edges the largest."""
        exists = self.exists.to(table.device)
        if self.level == "edge":
            return table[exists]
        return table.masked_fill(~exists, -torch.inf).amax(0)[1:]
