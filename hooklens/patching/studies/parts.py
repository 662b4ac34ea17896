"""The parts of a circuit that are taken out of it: edges, or nodes with all edges that leave them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from hooklens.arguments import read_one_of, require, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import HookedConfig
from hooklens.errors import InputError
from hooklens.patching.circuits.faithfulness import evaluate_circuits
from hooklens.patching.circuits.result import CircuitResult
from hooklens.patching.errors import SiteError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.metrics.function import as_metric

Unit = Literal["nodes", "edges"]
Part = str
"""A node's name, or an edge as `"a0.h1 -> logits"`."""


class Parts:
    """What a circuit is made of, and the circuits that are left when some of it is taken out.

    A node is taken out with all edges that leave it: what it writes is then ablated for every reader. From the network
    all of them are taken, from the circuit those that it holds.

    Args:
        circuit: the circuit.
        cfg: the network's config.
        unit: what its parts are.

    Attributes:
        names: the parts, from the embeddings up.

    Raises:
        InputError: no circuit, an unknown unit, or a circuit without edges.
        SiteError: the network has not all the edges.
    """

    def __init__(self, circuit: Circuit, cfg: HookedConfig, unit: str, *, what: str) -> None:
        require(circuit, kind=Circuit, what=f"{what}: circuit", expected="a Circuit")
        self.unit = read_one_of(unit, what=f"{what}: unit", options=("nodes", "edges"))
        circuit.check(cfg)
        if not len(circuit):
            raise InputError(f"{what}: the circuit has no edges, so nothing can be taken out of it")
        self.what, self.circuit, self.network = what, circuit, Circuit.full(cfg)
        self.names = tuple(dict.fromkeys(self._part_of(edge) for edge in circuit))

    def left(self, removed: Iterable[Part], *, of_network: bool = False) -> Circuit:
        """The circuit, or the network, without some parts."""
        gone = set(removed)
        whole = self.network if of_network else self.circuit
        return Circuit(edge for edge in whole if self._part_of(edge) not in gone)

    def read_sets(self, given: Mapping[str, Iterable[Part]] | None) -> dict[str, tuple[Part, ...]]:
        """Sets of parts that a caller names.

        Raises:
            InputError: no mapping from a name to a list of texts.
            SiteError: what is no part of the circuit; all of them are named.
        """
        if given is None:
            return {}
        require(given, kind=Mapping, what=f"{self.what}: sets", expected="a mapping from name to parts")
        read = {}
        for name, parts in given.items():
            listed = [] if isinstance(parts, str) or not isinstance(parts, Iterable) else list(parts)
            if not isinstance(name, str) or not listed or not all(isinstance(part, str) for part in listed):
                raise InputError(
                    f"{self.what}: the set {name!r} is {show(parts)}; expected names of {self.unit} of the circuit "
                    "in a list"
                )
            if name == "nothing" or name.startswith(("random ", "greedy ")):
                raise InputError(
                    f"{self.what}: the set {name!r} has a name of those that are drawn or searched for; give it another"
                )
            read[name] = tuple(dict.fromkeys(listed))
        unknown = sorted({part for parts in read.values() for part in parts} - set(self.names))
        if unknown:
            raise SiteError(
                f"{self.what}: {unknown} are no {self.unit} of the circuit, which has {', '.join(self.names[:20])}"
                f"{' and others' if len(self.names) > 20 else ''}"
            )
        return read

    def draw_sets(self, n_sets: int, seed: int) -> dict[str, tuple[Part, ...]]:
        """Random sets: each part is in a set with probability 1/2, and sets are not empty (Wang et al. 2022)."""
        generator = torch.Generator().manual_seed(seed)
        drawn: dict[str, tuple[Part, ...]] = {}
        while len(drawn) < n_sets:
            inside = (torch.rand(len(self.names), generator=generator) < 0.5).tolist()
            if any(inside):
                drawn[f"random {len(drawn)}"] = tuple(
                    name for name, chosen in zip(self.names, inside, strict=True) if chosen
                )
        return drawn

    def _part_of(self, edge: tuple[str, str]) -> Part:
        return edge[0] if self.unit == "nodes" else f"{edge[0]} -> {edge[1]}"


def evaluate_distinct(
    model: HookedCausalLM, prompts: tuple[Any, Any], circuits: Sequence[Circuit], metric: Any, options: dict[str, Any]
) -> CircuitResult:
    """The values of circuits, in their order; those that occur several times are run once.

    Raises:
        MetricError: it is no metric; several by name are none.
    """
    distinct = list(dict.fromkeys(circuits))
    found: CircuitResult = evaluate_circuits(model, *prompts, distinct, as_metric(metric), **options)
    row = {circuit: index for index, circuit in enumerate(distinct)}
    return found.take([row[circuit] for circuit in circuits], labels=range(len(circuits)))
