"""Circuits that no score has chosen, of the sizes of those that one has: what a faithfulness is compared with."""

import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from hooklens.arguments import read_int, read_seed, reads
from hooklens.errors import HookLensError
from hooklens.patching.choices.choice import EdgeChoice, take_greedily
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Edge


@reads()
def random_circuits(
    edges: ScoredEdges, sizes: Sequence[int], *, choice: EdgeChoice | None = None, seed: int = 0
) -> list[Circuit]:
    """Circuits drawn at random, connected as a choice would connect them.

    Edges get scores drawn evenly from 0 to 1. For `"greedy"` and `"top"` these are what the choice goes by, so
    circuits of one call hold each other. For `"pruned"` and `"optimal"`, of whose edges all are on paths from the
    embeddings to the logits, a circuit grows by such paths, whose edges are drawn at random; see `grow_by_paths`.

    Args:
        edges: the edges there are; their scores do not matter.
        sizes: numbers of edges, one for each circuit.
        choice: how real circuits are chosen; None: greedily.
        seed: draws them. The global random state is neither read nor moved.

    Raises:
        InputError: a size that is no number of edges.
        HookLensError: no circuit of a size is connected.
    """
    made = EdgeChoice() if choice is None else choice
    number = read_seed(seed, what="random_circuits: seed")
    counts = [read_int(size, what="random_circuits: a size", least=0, most=edges.n_edges) for size in sizes]
    if made.search in ("pruned", "optimal"):
        generator = random.Random(number)
        return [grow_by_paths(edges, size, generator) for size in counts]
    draws = torch.rand(edges.exists.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
    drawn = replace(edges, scores=draws.to(edges.exists.device).masked_fill(~edges.exists, 0.0))
    ordered = (
        drawn.top(max(counts, default=0))
        if made.search == "top"
        else take_greedily(drawn, max(counts, default=0), signed=False)
    )
    return [Circuit(ordered[:size]) for size in counts]


def grow_by_paths(edges: ScoredEdges, k: int, generator: random.Random) -> Circuit:
    """A random circuit of `k` edges, all of them on paths from the embeddings to the logits.

    Each step draws an edge that ends in the circuit (or the logits); where it begins outside, edges are drawn back
    from there until one begins in the circuit or in the embeddings. Paths longer than what is left are dropped.

    Raises:
        HookLensError: no such circuit was found, for hardly any has this size.
    """
    into = _edges_into(edges)
    for _ in range(_TRIES):
        chosen = _grow(into, edges.inputs, k, generator)
        if len(chosen) == k:
            return Circuit(chosen)
    raise HookLensError(
        f"{_TRIES} draws gave no circuit of {k} of {edges.n_edges} edges with all of them on paths from the embeddings "
        "to the logits; ask for another size"
    )


_TRIES = 20


def _edges_into(edges: ScoredEdges) -> dict[str, list[str]]:
    """By the name of each reader the writers that it reads."""
    exists = edges.exists.T.tolist()
    return {
        reader: [writer for writer, there in zip(edges.writers, row, strict=True) if there]
        for reader, row in zip(edges.readers, exists, strict=True)
    }


def _grow(into: dict[str, list[str]], inputs: dict[str, list[str]], k: int, generator: random.Random) -> set[Edge]:
    chosen: set[Edge] = set()
    present = {"embed"}
    waiting: list[Edge] = [(writer, "logits") for writer in into["logits"]]
    dropped: list[Edge] = []
    while len(chosen) < k and (waiting or dropped):
        left = k - len(chosen)
        if not waiting:
            # What was dropped may now begin in the circuit, or be drawn with a shorter path.
            waiting = [edge for edge in dropped if edge[0] in present or left > 1]
            dropped = []
            if not waiting:
                break
        place = generator.randrange(len(waiting))
        waiting[place], waiting[-1] = waiting[-1], waiting[place]
        edge = waiting.pop()
        if edge in chosen:
            continue
        path = [edge]
        while path[-1][0] not in present and len(path) <= left:
            reader = generator.choice(inputs[path[-1][0]])
            path.append((generator.choice(into[reader]), reader))
        if path[-1][0] not in present or len(path) > left:
            dropped.append(edge)
            continue
        chosen.update(path)
        for writer, _ in path:
            if writer not in present:
                present.add(writer)
                waiting += [(source, reader) for reader in inputs[writer] for source in into[reader]]
    return chosen
