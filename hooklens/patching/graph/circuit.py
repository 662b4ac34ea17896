"""Circuits: sets of edges between embeddings, heads, MLPs and logits.

A circuit claims that a behaviour is computed along its edges: what every other edge carries may be replaced by
what it carries on other prompts, and the behaviour stays (Wang et al. 2022, "Interpretability in the Wild"; Conmy
et al. 2023, "Towards Automated Circuit Discovery"). This module holds the claim; `evaluate_circuits` tests it.

An edge is a pair of names (writer, reader), see `nodes`: `("a0.h3", "a1.h2.k")` is what head 3 of block 0
contributes to the keys of head 2 of block 1.
"""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.display import MOST_COLUMNS, Displayed, Listing, Summary
from hooklens.errors import CheckpointError, join_names
from hooklens.files import replace_file
from hooklens.optional import import_package
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.nodes import (
    Edge,
    inputs_of,
    list_edges,
    list_readers,
    list_writers,
    parse_writers,
    reader_place,
    writer_place,
)

if TYPE_CHECKING:
    import pandas

_FORMAT = "hooklens.patching.circuit-1"
_SHOWN = 6
_MOST_HEADS, _MOST_EDGES = 40, 200


@dataclass(frozen=True, init=False, repr=False)
class Circuit(Displayed):
    """A set of edges.

    Circuits are compared, united (`|`), cut (`&`), subtracted (`-`) and tested for being part of another (`<=`)
    like sets; iteration gives the edges reader by reader from the bottom of the network to the top.

    Attributes:
        edges: (writer, reader) names, each once.

    Example:
        >>> circuit = Circuit([("embed", "a0.h1.v"), ("a0.h1", "logits")])
        >>> ("a0.h1", "logits") in circuit
        True
    """

    edges: tuple[Edge, ...]
    _members: frozenset[Edge] = field(compare=False)

    def __init__(self, edges: Iterable[Edge] = ()) -> None:
        """The circuit of some edges.

        Args:
            edges: pairs of names, in any order; repeated ones count once.

        Raises:
            SiteError: what is no pair of a writer's and a reader's name; all of them are named.
        """
        given = list(edges)
        wrong = [repr(edge) for edge in given if not _is_edge(edge)]
        if wrong:
            raise SiteError(
                f"a circuit is a set of edges (writer, reader); these are none: {_join(wrong)}. Writers are 'embed', "
                "heads 'a0.h1' and MLPs 'm0', readers 'a0.h1.q' (or '.k', '.v'), 'm0' and 'logits'"
            )
        members = frozenset(given)
        object.__setattr__(self, "_members", members)
        object.__setattr__(self, "edges", tuple(sorted(members, key=_place)))

    @classmethod
    def full(cls, cfg: HookedConfig) -> "Circuit":
        """All edges of a network."""
        return cls(list_edges(cfg))

    @classmethod
    def of_nodes(cls, cfg: HookedConfig, nodes: Sequence[str]) -> "Circuit":
        """All edges that leave some nodes: the circuit in which every other node is ablated whole.

        Args:
            cfg: the network's config.
            nodes: names of writers, `"embed"`, `"a0.h1"`, `"m0"`.

        Raises:
            InputError: no list of names.
            SiteError: no such writers; all of them are named.
        """
        chosen = {str(writer) for writer in parse_writers(nodes, cfg)}
        return cls(edge for edge in list_edges(cfg) if edge[0] in chosen)

    def __len__(self) -> int:
        return len(self.edges)

    def __iter__(self) -> Iterator[Edge]:
        return iter(self.edges)

    def __contains__(self, edge: object) -> bool:
        return edge in self._members

    def __or__(self, other: "Circuit") -> "Circuit":
        return Circuit(self._members | other._members)

    def __and__(self, other: "Circuit") -> "Circuit":
        return Circuit(self._members & other._members)

    def __sub__(self, other: "Circuit") -> "Circuit":
        return Circuit(self._members - other._members)

    def __le__(self, other: "Circuit") -> bool:
        return self._members <= other._members

    def __repr__(self) -> str:
        """As many of the edges next to the logits as stand in a line."""
        n_shown = min(_SHOWN, len(self))
        while True:
            shown = ", ".join(f"{writer} -> {reader}" for writer, reader in self.edges[::-1][:n_shown])
            more = f", and {len(self) - n_shown} more" if len(self) > n_shown > 0 else ""
            text = f"Circuit({len(self)} edges{': ' if shown else ''}{shown}{more})"
            if len(text) <= MOST_COLUMNS or not n_shown:
                return text
            n_shown -= 1

    def _summary(self) -> Summary:
        heads = self.heads()
        return Summary(
            title=f"Circuit of {len(self):,} edges",
            facts={
                "nodes": f"{len(self.nodes()):,}, {len(heads):,} of them heads",
                "heads": ", ".join(heads[:_MOST_HEADS]) + (", ..." if len(heads) > _MOST_HEADS else "") or None,
            },
            listing=self.edge_listing(),
        )

    def edge_listing(self) -> Listing:
        """The edges for a display, those next to the logits first."""
        return Listing(
            columns=("writer", "reader"),
            rows=self.edges[: -_MOST_EDGES - 1 : -1],
            what="edges",
            n_rows=len(self),
        )

    def with_edges(self, edges: Iterable[Edge]) -> "Circuit":
        """The circuit with some edges added."""
        return self | Circuit(edges)

    def without_edges(self, edges: Iterable[Edge]) -> "Circuit":
        """The circuit with some edges taken away.

        Raises:
            SiteError: edges that are not in it; all of them are named.
        """
        removed = Circuit(edges)
        missing = removed - self
        if missing:
            raise SiteError(f"the circuit of {len(self)} edges does not hold {_join(map(_show, missing))}")
        return self - removed

    def complement(self, cfg: HookedConfig) -> "Circuit":
        """All edges of a network that are not in the circuit.

        Raises:
            SiteError: the circuit has edges that the network has not.
        """
        self.check(cfg)
        return Circuit.full(cfg) - self

    def nodes(self) -> tuple[str, ...]:
        """What writes in the circuit, from the embeddings up, and `"logits"` where it ends there.

        A head or MLP that reads, but from which no edge leaves, does nothing and is not among them.
        """
        writers = sorted({writer for writer, _ in self.edges}, key=writer_place)
        return (*writers, "logits") if any(reader == "logits" for _, reader in self.edges) else tuple(writers)

    def heads(self) -> tuple[str, ...]:
        """The heads among the nodes."""
        return tuple(name for name in self.nodes() if name.startswith("a"))

    def pruned(self, cfg: HookedConfig) -> "Circuit":
        """The edges on a path from the embeddings to the logits.

        A path goes from a head's queries, keys and values on to the head, under grouped queries from a key-value
        head's to every head of its group. Edges that lead nowhere do nothing. Edges from where no path leads do
        nothing under `ablation="resample"`; under `"mean"` and `"zero"` a head or MLP with all its inputs ablated
        writes what it makes of these, which is not what it is ablated to.

        Raises:
            SiteError: the circuit has edges that the network has not.
        """
        self.check(cfg)
        inputs = {
            str(writer): [str(reader) for reader in inputs_of(writer, group_size=cfg.n_heads // cfg.n_kv_heads)]
            for writer in list_writers(cfg)
        }
        return keep_paths(self, inputs)

    def check(self, cfg: HookedConfig) -> None:
        """Check that a network has all the edges.

        Raises:
            SiteError: it has not; all edges that are missing are named.
        """
        existing = set(list_edges(cfg))
        writers, readers = set(map(str, list_writers(cfg))), set(map(str, list_readers(cfg)))
        unknown = sorted(
            {writer for writer, _ in self.edges if writer not in writers}
            | {reader for _, reader in self.edges if reader not in readers}
        )
        absent = [
            _show(edge) for edge in self.edges if edge not in existing and edge[0] in writers and edge[1] in readers
        ]
        problems = []
        if unknown:
            problems.append(
                f"no nodes {join_names(unknown)} (it has layers 0 to {cfg.n_layers - 1}, heads 0 to {cfg.n_heads - 1}, "
                f"key-value heads 0 to {cfg.n_kv_heads - 1} for '.k' and '.v')"
            )
        if absent:
            problems.append(f"no edges {_join(absent)} (in {cfg.wiring} blocks the reader does not read this writer)")
        if problems:
            raise SiteError(f"the circuit does not fit the network, which has {', and '.join(problems)}")

    def to_mask(self, cfg: HookedConfig) -> Bool[Tensor, "reader writer"]:
        """Which readers get which writers, in the order of `nodes.list_readers` and `nodes.list_writers`.

        Raises:
            SiteError: the circuit has edges that the network has not.
        """
        self.check(cfg)
        row = {str(reader): index for index, reader in enumerate(list_readers(cfg))}
        column = {str(writer): index for index, writer in enumerate(list_writers(cfg))}
        mask = torch.zeros(len(row), len(column), dtype=torch.bool)
        for writer, reader in self.edges:
            mask[row[reader], column[writer]] = True
        return mask

    def to_dataframe(self) -> "pandas.DataFrame":
        """One row per edge: writer, reader."""
        table: pandas.DataFrame = import_package("pandas").DataFrame(self.edges, columns=["writer", "reader"])
        return table

    def save(self, path: str | Path) -> None:
        """Write the circuit to a JSON file, whole or not at all.

        Raises:
            OSError: the file cannot be written.
        """
        text = json.dumps({"format": _FORMAT, "edges": self.edges}, indent=1) + "\n"
        with replace_file(path) as draft:
            draft.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is missing, damaged, or holds no circuit.
        """
        try:
            stored = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"cannot read a circuit from {path}: {error}") from error
        if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
            raise CheckpointError(f"{path} is not a saved circuit; write one with circuit.save(path)")
        try:
            return cls(tuple(edge) for edge in stored["edges"])
        except (KeyError, TypeError, SiteError) as error:
            raise CheckpointError(f"the circuit in {path} is damaged: 'edges' ({error})") from error


def keep_paths(circuit: Circuit, inputs: Mapping[str, Sequence[str]]) -> Circuit:
    """The edges of a circuit on a path from the embeddings to the logits.

    Args:
        circuit: the circuit.
        inputs: by the name of each writer the readers that it is made from.
    """
    fed: dict[str, list[str]] = {}
    for writer, readers in inputs.items():
        for reader in readers:
            fed.setdefault(reader, []).append(writer)
    reached = {"embed"}
    for writer, reader in circuit.edges:
        # Readers come in the order of the network, so all edges into a writer come before those out of it.
        if writer in reached:
            reached.update(fed.get(reader, ()))
    useful = {"logits"}
    for writer, reader in reversed(circuit.edges):
        if reader in useful:
            useful.update(inputs[writer])
    return Circuit((writer, reader) for writer, reader in circuit.edges if writer in reached and reader in useful)


def _is_edge(edge: object) -> bool:
    if not isinstance(edge, tuple) or len(edge) != 2 or not all(isinstance(name, str) for name in edge):
        return False
    try:
        _place(edge)
    except SiteError:
        return False
    return True


def _place(edge: Edge) -> tuple[float, ...]:
    return *reader_place(edge[1]), *writer_place(edge[0])


def _show(edge: Edge) -> str:
    return f"{edge[0]} -> {edge[1]}"


def _join(shown: Iterable[str], *, limit: int = 20) -> str:
    listed: Collection[str] = list(shown)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(list(listed)[:limit]) + more
