"""Edges between named nodes, read from whatever holds some: scores of all edges, a circuit, a table, a list."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from hooklens.errors import InputError, join_names

Level = tuple[float, int]
"""Where a node stands: its layer, -1 for the embeddings; and 0 for heads, 1 for MLPs."""

_NODE = re.compile(r"a(?P<layer>\d+)\.h(?P<head>\d+)(?:\.(?P<port>[qkv]))?|m(?P<mlp>\d+)|embed|logits")


@runtime_checkable
class ScoredGraph(Protocol):
    """A score for every edge, as `EdgeScores` and `ScoredEdges` of `hooklens.patching` have it.

    Attributes:
        scores: `[writer reader]`.
        writers, readers: names of nodes.
        exists: `[writer reader]`, where there is an edge.
    """

    @property
    def scores(self) -> Tensor: ...  # noqa: D102

    @property
    def writers(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def readers(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def exists(self) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Edge:
    """An edge.

    Attributes:
        writer: the node that it starts from.
        reader: what reads, a node or one of a head's three inputs.
        nodes: the nodes that it ends in: several where heads share keys and values.
        port: `"q"`, `"k"` or `"v"`, which input of a head it is; else empty.
        score: NaN where it has none.
    """

    writer: str
    reader: str
    nodes: tuple[str, ...]
    port: str
    score: float

    @property
    def weight(self) -> float:
        """How far the score is from 0."""
        return 0.0 if math.isnan(self.score) else abs(self.score)


def read_pairs(given: Any) -> dict[tuple[str, str], float]:
    """Edges with their scores, NaN where they have none.

    Args:
        given: a `ScoredGraph`; what has `edges`, pairs of names (`Circuit`); a table with columns `writer` and
            `reader` and perhaps `score`; a mapping from pair to score; or pairs, or triples with the score.

    Raises:
        InputError: anything else.
    """
    if isinstance(given, ScoredGraph):
        places = given.exists.nonzero().tolist()
        scores = given.scores.detach().float().cpu()
        return {(given.writers[row], given.readers[column]): float(scores[row, column]) for row, column in places}
    if hasattr(given, "columns"):
        missing = [name for name in ("writer", "reader") if name not in given.columns]
        if missing:
            raise InputError(f"circuit: the table lacks the columns {join_names(missing)}")
        listed = given["score"].tolist() if "score" in given.columns else [math.nan] * len(given)
        triples = zip(given["writer"].tolist(), given["reader"].tolist(), listed, strict=True)
        return {(str(writer), str(reader)): float(score) for writer, reader, score in triples}
    if isinstance(given, Mapping):
        return {_read_pair(pair): float(score) for pair, score in given.items()}
    found: dict[tuple[str, str], float] = {}
    for edge in getattr(given, "edges", given):
        parts = tuple(edge) if not isinstance(edge, str) else ()
        found[_read_pair(parts[:2])] = float(parts[2]) if len(parts) == 3 else math.nan
    return found


def _read_pair(pair: Any) -> tuple[str, str]:
    if not isinstance(pair, tuple) or len(pair) != 2 or not all(isinstance(name, str) for name in pair):
        raise InputError(f"circuit: {pair!r} is no edge; expected (writer, reader), two names of nodes")
    return pair


def group_sizes(readers: Iterable[str]) -> dict[int, int]:
    """How many query heads share a head's keys in each layer, told from the names of all readers."""
    heads: dict[int, dict[str, set[str]]] = {}
    for name in readers:
        match = _NODE.fullmatch(name)
        if match and match["port"]:
            heads.setdefault(int(match["layer"]), {}).setdefault(match["port"], set()).add(match["head"])
    return {layer: len(ports["q"]) // len(ports["k"]) for layer, ports in heads.items() if {"q", "k"} <= ports.keys()}


def make_edges(
    pairs: Mapping[tuple[str, str], float],
    layers: Mapping[str, int],
    groups: Mapping[int, int],
    *,
    otherwise: int = 1,
) -> list[Edge]:
    """Edges with the nodes that they end in.

    Args:
        pairs: names with scores.
        layers: of nodes that are not called as those of `hooklens.patching` are.
        groups: by layer, how many query heads share keys and values.
        otherwise: how many do in other layers.
    """
    writers = {writer for writer, _ in pairs}
    edges = []
    for (writer, reader), score in pairs.items():
        match = None if reader in layers else _NODE.fullmatch(reader)
        if match is None or not match["port"]:
            edges.append(Edge(writer, reader, (reader,), "", score))
            continue
        layer, head, port = int(match["layer"]), int(match["head"]), match["port"]
        size = 1 if port == "q" else groups.get(layer, otherwise)
        heads = [f"a{layer}.h{head * size + place}" for place in range(size)]
        edges.append(Edge(writer, reader, tuple(name for name in heads if name in writers) or (heads[0],), port, score))
    return edges


def level_of(node: str, layers: Mapping[str, int]) -> Level | None:
    """Where a node stands; None for a name that says nothing of it."""
    if node in layers:
        return float(layers[node]), 0
    match = _NODE.fullmatch(node)
    if match is None or match["port"]:
        return None
    if node == "embed":
        return -1.0, 0
    if node == "logits":
        return math.inf, 0
    return (float(match["mlp"]), 1) if match["mlp"] else (float(match["layer"]), 0)


def name_level(level: Level, *, is_named: bool) -> str:
    """What is written beside the nodes of a level.

    Args:
        level: the level.
        is_named: whether its nodes have names of a caller's own.
    """
    layer, kind = level
    if is_named:
        return f"layer {layer:g}"
    if not 0 <= layer < math.inf:
        return ""
    return f"{'MLP' if kind else 'attention'} {layer:g}"
