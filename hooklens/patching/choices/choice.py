"""How a circuit of a given size is chosen from scores.

Four searches:

- `"greedy"` (Hanna et al. 2024, "Have Faith in Faithfulness"): from the logits backwards, each step takes the strongest
  edge that ends in the logits or in a node of which an edge is chosen already. No edge leads nowhere, but an edge may
  come from where nothing leads.
- `"top"`: simply the strongest.
- `"pruned"` (Mueller et al. 2025, "MIB", by default): the strongest, without those that are on no path from the
  embeddings to the logits, so usually fewer than asked for.
- `"optimal"`: of all circuits of this size whose edges are all on such paths, the one with the largest sum of scores,
  by an integer programme (Nikankin et al. 2025, "Improving Circuit Faithfulness via Better Edge Selection").

Two orders: `"absolute"` takes edges that matter either way, `"signed"` those that work for the behaviour, first. MIB
measures its ratio of performance (CPR) on circuits of the second order and its distance (CMD) on those of the first.
"""

import heapq
from dataclasses import dataclass
from typing import Literal, get_args

from hooklens.arguments import optional, read_flag, read_int, read_number, read_one_of, require
from hooklens.errors import InputError
from hooklens.patching.choices.programme import solve
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit, keep_paths
from hooklens.patching.graph.nodes import Edge

Search = Literal["greedy", "top", "pruned", "optimal"]
Order = Literal["absolute", "signed"]


@dataclass(frozen=True, kw_only=True)
class EdgeChoice:
    """A way to choose edges.

    Attributes:
        search: how circuits are put together, see the module.
        by: what edges are ordered by.
        time_limit: seconds that `"optimal"` may take for a circuit; None: as long as it takes.

    Raises:
        InputError: an unknown word, or no time.

    Example:
        >>> scores.circuit(100, choice=EdgeChoice(search="optimal", by="signed"))
    """

    search: Search = "greedy"
    by: Order = "absolute"
    time_limit: float | None = None

    def __post_init__(self) -> None:
        read_one_of(self.search, what="EdgeChoice: search", options=get_args(Search))
        read_one_of(self.by, what="EdgeChoice: by", options=get_args(Order))
        optional(_read_seconds)(self.time_limit, what="EdgeChoice: time_limit")

    def circuit(self, edges: ScoredEdges, k: int) -> Circuit:
        """The circuit of `k` edges; of all where there are no more, and of fewer where they are pruned.

        Raises:
            InputError: no number of edges.
            HookLensError: no connected circuit has exactly so many edges, or the time was not enough to find the best.
            MissingDependencyError: scipy (the extra `stats`), which the programme needs, is not installed.
        """
        size = min(read_int(k, what="circuit: k", least=0), edges.n_edges)
        signed = self.by == "signed"
        if self.search == "optimal":
            return solve(edges, size, signed=signed, time_limit=self.time_limit)
        if self.search == "greedy":
            return Circuit(take_greedily(edges, size, signed=signed))
        chosen = Circuit(edges.top(size, signed=signed))
        return chosen if self.search == "top" else keep_paths(chosen, edges.inputs)


def read_choice(choice: EdgeChoice | None, *, connected: bool, what: str) -> EdgeChoice:
    """The choice that is meant by one, or by `connected` where there is none.

    Raises:
        InputError: another kind of value, or both.
    """
    greedy = read_flag(connected, what=f"{what}: connected")
    if choice is None:
        return EdgeChoice(search="greedy" if greedy else "top")
    require(choice, kind=EdgeChoice, what=f"{what}: choice", expected="an EdgeChoice")
    if not greedy:
        raise InputError(
            f"{what}: choice={choice} and connected=False both say how edges are chosen; leave connected out, "
            "EdgeChoice(search='top') takes simply the strongest"
        )
    return choice


def _read_seconds(given: object, **options: object) -> float:
    return read_number(
        given, what=str(options["what"]), expected="a number of seconds above 0", allows=lambda number: number > 0
    )


def take_greedily(edges: ScoredEdges, k: int, *, signed: bool) -> list[Edge]:
    """The edges in the order in which the greedy search takes them, so those of `k` begin those of `k + 1`."""
    strength = edges.strength(signed=signed).tolist()
    exists, inputs = edges.exists.tolist(), edges.inputs
    column = {name: index for index, name in enumerate(edges.readers)}
    chosen: list[Edge] = []
    seen: set[str] = set()
    waiting: list[tuple[float, int, int]] = []

    def open_reader(reader: str) -> None:
        if reader not in seen:
            seen.add(reader)
            for writer in range(len(edges.writers)):
                if exists[writer][column[reader]]:
                    # Of equally strong edges the first in the table is taken, as by `top`.
                    heapq.heappush(waiting, (-strength[writer][column[reader]], writer, column[reader]))

    open_reader("logits")
    while waiting and len(chosen) < k:
        _, writer, reader = heapq.heappop(waiting)
        name = edges.writers[writer]
        chosen.append((name, edges.readers[reader]))
        for source in inputs[name]:
            open_reader(source)
    return chosen
