"""MIB's files of scored graphs: JSON as EAP-IG's `Graph.to_json` writes and `Graph.from_json` reads it.

| in the file | here |
|---|---|
| `input` | `embed` |
| `a0.h1`, `m0`, `logits` | the same |
| `input->a0.h1<q>` | `("embed", "a0.h1.q")` |
| `a0.h1->m1`, `m1->logits` | `("a0.h1", "m1")`, `("m1", "logits")` |

Scores have the sign of `EdgeScores.contributions`: above 0 for what works for the behaviour.

Their graph gives every query head keys and values of its own, and every layer attention and an MLP. Under grouped
queries an edge to a key-value head is therefore several edges of a file, one for each head of the group: it is written
as so many equal parts, and read as their sum; it is in the circuit where one of them is. Nodes that a network lacks are
written with the score 0 and outside the circuit, and refused when they are read with anything else.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import require, show
from hooklens.config import HookedConfig
from hooklens.display import Displayed, Summary
from hooklens.errors import CheckpointError, InputError, join_names
from hooklens.files import replace_file
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import Edge, list_edges

_SHOWN = 20


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class ScoredGraph(Displayed):
    """What a file of MIB's holds: scores of edges, and of nodes and their outputs' entries where there are any.

    Attributes:
        edges: the edges' scores.
        circuit: the edges that are in the circuit.
        node_scores: `[writer]`, NaN where a node has none; None: nodes are not scored.
        neuron_scores: `[writer d_model]`, of each entry of what a node writes; None: they are not scored.
        neurons: `[writer d_model]`, the entries that are in the circuit; None: all of a node that is.

    Raises:
        SiteError: the circuit has edges that are none here.
        InputError: tensors of other shapes.
    """

    edges: ScoredEdges
    circuit: Circuit
    node_scores: Float[Tensor, " writer"] | None = None
    neuron_scores: Float[Tensor, "writer d_model"] | None = None
    neurons: Bool[Tensor, "writer d_model"] | None = None

    def __post_init__(self) -> None:
        require(self.edges, kind=ScoredEdges, what="ScoredGraph: edges", expected="ScoredEdges")
        self.edges.to_mask(self.circuit)
        for name, axes in (("node_scores", 1), ("neuron_scores", 2), ("neurons", 2)):
            found = getattr(self, name)
            if found is not None and (found.ndim != axes or len(found) != len(self.edges.writers)):
                raise InputError(
                    f"ScoredGraph: {name} is {show(found)}; expected {axes} axes, the first of the "
                    f"{len(self.edges.writers)} writers"
                )

    def _summary(self) -> Summary:
        parts = [f"{self.edges.n_edges} edges, {len(self.circuit)} in the circuit"]
        parts += ["scores of nodes"] if self.node_scores is not None else []
        parts += ["scores of neurons"] if self.neuron_scores is not None else []
        return Summary(
            title=f"ScoredGraph({', '.join(parts)})",
            facts={"weighted edges": f"{self.weighted_edge_count:,.1f}"},
            listing=self.edges.listing(),
        )

    @property
    def weighted_edge_count(self) -> float:
        """MIB's size of a circuit: its edges, each counted by the share of its writer's entries that are in it.

        Counted in their graph, in which an edge to a key-value head is one edge for each head of the group.
        """
        mask = self.edges.to_mask(self.circuit).double()
        copies = torch.tensor([float(len(_theirs(name, self._group_size))) for name in self.edges.readers])
        share = torch.ones(len(mask)) if self.neurons is None else self.neurons.double().mean(1).cpu()
        return float((mask.cpu() * copies.double()).sum(1) @ share.double())

    @property
    def _group_size(self) -> int:
        n_keys = sum(name.endswith(".k") for name in self.edges.readers)
        return sum(name.endswith(".q") for name in self.edges.readers) // n_keys if n_keys else 1

    def save(self, path: str | Path, cfg: HookedConfig) -> None:
        """Write a file that MIB's and EAP-IG's code reads, whole or not at all.

        Args:
            path: the file.
            cfg: the network's config.

        Raises:
            InputError: the config is of a network with other nodes.
            CheckpointError: the file cannot be written.
        """
        self._check(cfg)
        try:
            with replace_file(path) as draft:
                draft.write_text(json.dumps(self._to_json(cfg)), encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write a scored graph to {path}: {error}") from error

    def _check(self, cfg: HookedConfig) -> None:
        own = ScoredEdges.of(cfg, {})
        if (own.writers, own.readers) != (self.edges.writers, self.edges.readers):
            raise InputError(
                f"ScoredGraph: the scores are of {len(self.edges.writers)} writers and {len(self.edges.readers)} "
                f"readers, and cfg describes a network of other ones ({cfg.n_layers} layers, {cfg.n_heads} heads)"
            )

    def _to_json(self, cfg: HookedConfig) -> dict[str, Any]:
        writing = {writer for writer, _ in self.circuit}
        place = {name: index for index, name in enumerate(self.edges.writers)}
        nodes: dict[str, dict[str, Any]] = {}
        for name in _all_nodes(cfg):
            ours = "embed" if name == "input" else name
            nodes[name] = {"in_graph": ours in writing or name == "logits"}
            if name == "logits":
                continue
            index = place.get(ours)
            if self.node_scores is not None:
                nodes[name]["score"] = math.nan if index is None else float(self.node_scores[index])
            if self.neurons is not None:
                nodes[name]["neurons"] = [False] * cfg.d_model if index is None else self.neurons[index].tolist()
            if self.neuron_scores is not None:
                lacking = [math.nan] * cfg.d_model
                nodes[name]["neurons_scores"] = lacking if index is None else self.neuron_scores[index].tolist()
        edges = {name: {"score": 0.0, "in_graph": False} for name in _all_edges(cfg)}
        scores, group_size = self.edges.by_edge(), self._group_size
        for edge in list_edges(cfg):
            names = list(_names_of(edge, group_size))
            for name in names:
                edges[name] = {"score": scores[edge] / len(names), "in_graph": edge in self.circuit}
        return {"cfg": _describe(cfg), "nodes": nodes, "edges": edges}

    @classmethod
    def load(cls, path: str | Path, cfg: HookedConfig) -> "ScoredGraph":
        """Read a file of MIB's.

        Args:
            path: the file.
            cfg: the config of the network that it is of.

        Raises:
            CheckpointError: the file is missing or damaged, or of another network; all that is wrong is named.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read a scored graph from {path}: {error}") from error
        problems = list(_find_problems(stored, cfg))
        if problems:
            raise CheckpointError(f"{path} holds no scored graph of this network: {'; '.join(problems[:_SHOWN])}")
        group_size = cfg.n_heads // cfg.n_kv_heads
        scores: dict[Edge, float] = {}
        circuit = []
        for edge in list_edges(cfg):
            parts = [stored["edges"][name] for name in _names_of(edge, group_size)]
            scores[edge] = sum(float(part.get("score", 0.0)) for part in parts)
            if any(part["in_graph"] for part in parts):
                circuit.append(edge)
        edges = ScoredEdges.of(cfg, scores)
        return cls(
            edges=edges,
            circuit=Circuit(circuit),
            node_scores=_stack(stored["nodes"], edges.writers, "score", math.nan),
            neuron_scores=_stack(stored["nodes"], edges.writers, "neurons_scores", [math.nan] * cfg.d_model),
            neurons=_stack(stored["nodes"], edges.writers, "neurons", [False] * cfg.d_model),
        )


def _stack(nodes: Mapping[str, Any], writers: tuple[str, ...], key: str, absent: Any) -> Tensor | None:
    """The values of a key for every writer; None where no node has it."""
    if not any(key in node for node in nodes.values()):
        return None
    found = [nodes["input" if name == "embed" else name].get(key, absent) for name in writers]
    return torch.tensor(found, dtype=torch.bool if key == "neurons" else torch.float64)


def _describe(cfg: HookedConfig) -> dict[str, Any]:
    return {
        "n_layers": cfg.n_layers,
        "n_heads": cfg.n_heads,
        "parallel_attn_mlp": cfg.wiring != "sequential",
        "d_model": cfg.d_model,
    }


def _all_nodes(cfg: HookedConfig) -> list[str]:
    """The nodes of a file, in its order."""
    of_layers = [
        name
        for layer in range(cfg.n_layers)
        for name in (*(f"a{layer}.h{head}" for head in range(cfg.n_heads)), f"m{layer}")
    ]
    return ["input", *of_layers, "logits"]


def _all_edges(cfg: HookedConfig) -> Iterator[str]:
    """The edges of a file."""
    stream = ["input"]
    for layer in range(cfg.n_layers):
        heads = [f"a{layer}.h{head}" for head in range(cfg.n_heads)]
        of_heads, of_mlp = stream, [*stream, *heads] if cfg.wiring == "sequential" else stream
        yield from (f"{writer}->{head}<{kind}>" for writer in of_heads for head in heads for kind in "qkv")
        yield from (f"{writer}->m{layer}" for writer in of_mlp)
        stream = [*stream, *heads, f"m{layer}"]
    yield from (f"{writer}->logits" for writer in stream)


def _names_of(edge: Edge, group_size: int) -> Iterator[str]:
    """The edges of a file that one of ours is."""
    writer, reader = edge
    for name in _theirs(reader, group_size):
        yield f"{'input' if writer == 'embed' else writer}->{name}"


def _theirs(reader: str, group_size: int) -> list[str]:
    """The readers of a file that one of ours is: a key-value head's is one for each head of the group."""
    if not reader.startswith("a"):
        return [reader]
    node, _, kind = reader.rpartition(".")
    layer, _, head = node.partition(".h")
    if kind == "q":
        return [f"{node}<q>"]
    first = int(head) * group_size
    return [f"{layer}.h{number}<{kind}>" for number in range(first, first + group_size)]


def _find_problems(stored: Any, cfg: HookedConfig) -> Iterator[str]:
    """What keeps a file from being a scored graph of a network."""
    if not isinstance(stored, dict) or not all(isinstance(stored.get(key), dict) for key in ("cfg", "nodes", "edges")):
        yield f"it is {show(stored)}, expected mappings 'cfg', 'nodes' and 'edges', as Graph.to_json writes them"
        return
    for key, value in _describe(cfg).items():
        if stored["cfg"].get(key, value) != value:
            yield f"its {key} is {show(stored['cfg'][key])}, the network's is {value}"
    names = _all_nodes(cfg)
    for what, expected in (("nodes", names), ("edges", list(_all_edges(cfg)))):
        known = set(expected)
        # Files of theirs may leave the logits out, of which there is nothing to say.
        missing = [name for name in expected if name not in stored[what] and name != "logits"]
        unknown = [name for name in stored[what] if name not in known]
        if missing:
            yield f"{len(missing)} {what} are missing: {join_names(missing[:_SHOWN])}"
        if unknown:
            yield f"{len(unknown)} {what} are not the network's: {join_names(unknown[:_SHOWN])}"
        if missing or unknown:
            return
    yield from _wrong_entries(stored, cfg)


def _wrong_entries(stored: dict[str, Any], cfg: HookedConfig) -> Iterator[str]:
    for what in ("nodes", "edges"):
        for name, entry in stored[what].items():
            if not isinstance(entry, dict) or not isinstance(entry.get("in_graph"), bool):
                yield f"{name!r} is {show(entry)}, expected a mapping with 'in_graph', true or false"
            elif not _is_number(entry.get("score", 0.0)):
                yield f"the score of {name!r} is {show(entry['score'])}, expected a number"
            else:
                for key, holds in (("neurons", _is_flag), ("neurons_scores", _is_number)):
                    found = entry.get(key)
                    if found is not None and not (
                        isinstance(found, list) and len(found) == cfg.d_model and all(map(holds, found))
                    ):
                        yield f"{key!r} of {name!r} is {show(found)}, expected {cfg.d_model} entries"
    group_size = cfg.n_heads // cfg.n_kv_heads
    own = {name for edge in list_edges(cfg) for name in _names_of(edge, group_size)}
    for name, entry in stored["edges"].items():
        if name not in own and isinstance(entry, dict) and (entry.get("score", 0.0) != 0 or entry.get("in_graph")):
            yield f"{name!r} has a score or is in the circuit, but the network has no such edge"


def _is_number(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool)


def _is_flag(found: Any) -> bool:
    return isinstance(found, bool) or found in (0, 1)
