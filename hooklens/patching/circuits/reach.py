"""Which nodes a batch of circuits has to run: those that differ from a run at hand, and that something still reads."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.patching.graph.nodes import Graph, inputs_of

Masks = Bool[Tensor, "circuit reader writer"]


@dataclass(frozen=True)
class Wiring:
    """Which readers feed which writers.

    Attributes:
        graph: the nodes.
        inputs: of each writer the indices of its readers.
        fed_by: of each reader the indices of the writers that it feeds.
    """

    graph: Graph
    inputs: tuple[tuple[int, ...], ...]
    fed_by: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, cfg: HookedConfig) -> "Wiring":
        """The wiring of a network."""
        graph = Graph.of(cfg)
        index_of = {reader: index for index, reader in enumerate(graph.readers)}
        group_size = cfg.n_heads // cfg.n_kv_heads
        inputs = tuple(
            tuple(index_of[reader] for reader in inputs_of(writer, group_size=group_size)) for writer in graph.writers
        )
        fed_by: list[list[int]] = [[] for _ in graph.readers]
        for writer, readers in enumerate(inputs):
            for reader in readers:
                fed_by[reader].append(writer)
        return cls(graph, inputs, tuple(map(tuple, fed_by)))

    def find_nodes_to_run(self, masks: Masks, reference: Bool[Tensor, "reader writer"]) -> list[int]:
        """The writers whose output has to be computed, given that of all in the run of another circuit.

        A writer differs if, in one of the circuits, one of its readers gets other edges than in the reference, or the
        output of a writer that differs. It counts if edges lead from it to the logits. What differs and does not count
        keeps the reference's output, which nothing reads.

        Args:
            masks: circuits, parts of the reference.
            reference: the circuit whose run is at hand.
        """
        kept = masks.any(0)
        moved = (masks != reference).any(0).any(1).tolist()
        n_writers = len(self.graph.writers)
        differs = torch.zeros(n_writers, dtype=torch.bool)
        for writer, readers in enumerate(self.inputs):
            differs[writer] = any(moved[reader] or bool((kept[reader] & differs).any()) for reader in readers)
        reads = torch.zeros(len(self.graph.readers), dtype=torch.bool)
        reads[-1] = True
        wanted = []
        for writer in reversed(range(n_writers)):
            if bool((kept[:, writer] & reads).any()):
                reads[list(self.inputs[writer])] = True
                if differs[writer]:
                    wanted.append(writer)
        return wanted[::-1]
