"""The best connected circuit of a size, by an integer programme.

With `x(w, r)` 1 for an edge that is chosen, `y(w)` 1 for a writer that is in the circuit, and `s` the scores,

    maximise the sum of s(w, r) x(w, r)   where

    sum of x = k
    x(w, r) <= y(w)                                an edge leaves a writer of the circuit,
    y(w) <= sum of x(w, r) over all r              which some edge leaves,
    y(w) <= sum of x(v, r) over all r that feed w  and some edge enters, unless it is the embeddings,
    x(w, r) <= sum of y(v) over all v that r feeds and it enters a writer of the circuit, unless `r` is the logits.

Edges lead upwards, so from each of them these conditions lead on to the logits and back to the embeddings. Under
grouped queries a key-value head's reader feeds every head of its group.

scipy's solver (HiGHS) proves that what it finds is the best. Few edges of many can be in the best circuit, and the
programme without whole numbers, which takes a second for 32,491 edges (12 layers with 12 heads), tells which: a circuit
with an edge whose reduced cost is `d` has at most the relaxed sum less `d`. So the programme is solved among the edges
with a small one, and where its best circuit comes as near to the relaxed sum as that, no other edge can do better
(reduced-cost fixing; Wolsey 2020, "Integer Programming"). Otherwise it is solved among more.
"""

import time
from typing import Any

import numpy as np

from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit

_OPTIMAL, _OUT_OF_TIME, _INFEASIBLE = 0, 1, 2
# Of the relaxed sum: the reduced costs of the edges that are tried first, and by how much more each time.
_FIRST_MARGIN, _WIDER = 0.001, 8.0
# The solver's numbers are exact to about this.
_SLACK = 1e-6


def solve(edges: ScoredEdges, k: int, *, signed: bool, time_limit: float | None) -> Circuit:
    """The circuit of exactly `k` edges, all on paths from the embeddings to the logits, with the largest sum of scores.

    Raises:
        HookLensError: there is none of this size, or the limit came before the proof that it is the best.
        MissingDependencyError: scipy is not installed.
    """
    if k == 0:
        return Circuit()
    programme = _Programme(edges, k, signed=signed, time_limit=time_limit)
    bound, costs = programme.relax()
    margin = _FIRST_MARGIN * max(abs(bound), _SLACK)
    while True:
        tried = costs <= margin
        found = programme.solve(tried)
        if tried.all():
            break
        if found is not None:
            lacking = bound - programme.value(found) + _SLACK
            if lacking <= margin:
                break
            margin = lacking
        else:
            margin *= _WIDER
    if found is None:
        raise _too_many(k)
    return Circuit(
        (edges.writers[writer], edges.readers[reader])
        for (writer, reader), chosen in zip(programme.table, found, strict=True)
        if chosen
    )


def _too_many(k: int) -> HookLensError:
    return HookLensError(
        f"no circuit of exactly {k} edges has all of them on paths from the embeddings to the logits; ask for another "
        "size"
    )


class _Programme:
    """The programme for one size, with scores of at most 1.

    Args:
        edges: the edges.
        k: how many to choose.
        signed: by scores, not by magnitudes.
        time_limit: seconds for all that is solved.
    """

    def __init__(self, edges: ScoredEdges, k: int, *, signed: bool, time_limit: float | None) -> None:
        self.optimize, sparse = import_package("scipy.optimize"), import_package("scipy.sparse")
        self.k, self.time_limit, self.begun = k, time_limit, time.monotonic()
        self.table: list[list[int]] = edges.exists.nonzero().tolist()
        strength = edges.strength(signed=signed)
        gains = np.array([float(strength[writer, reader]) for writer, reader in self.table])
        # Scores may be small; the solver's tolerances are those of numbers around 1.
        self.gains = gains / (np.abs(gains).max() or 1.0)
        rows = _conditions(edges, self.table)
        data = [(number, column, value) for number, row in enumerate(rows) for column, value in row]
        numbers, columns, values = zip(*data, strict=True)
        self.n_writers = len(edges.writers)
        shape = (len(rows), len(self.table) + self.n_writers)
        self.below = sparse.csr_matrix((values, (numbers, columns)), shape=shape)
        self.size = self._widen(np.ones(len(self.table)))[None]

    def value(self, chosen: Any) -> float:
        """The sum of the scores of some edges."""
        return float(self.gains[chosen].sum())

    def relax(self) -> tuple[float, Any]:
        """The largest sum that fractions of edges reach, and by how much each edge that has none would lower it.

        Raises:
            HookLensError: there is no circuit, or no time.
        """
        found = self.optimize.linprog(
            self._widen(-self.gains),
            A_ub=self.below,
            b_ub=np.zeros(self.below.shape[0]),
            A_eq=self.size,
            b_eq=[self.k],
            bounds=(0, 1),
            method="highs",
            options=self._time_left(),
        )
        if found.status == _INFEASIBLE:
            raise _too_many(self.k)
        if found.status != _OPTIMAL:
            raise self._unproven(found)
        return -float(found.fun), np.array(found.lower.marginals[: len(self.table)])

    def solve(self, tried: Any) -> Any:
        """Which edges the best circuit among some of them has; None: there is no circuit among them.

        Raises:
            HookLensError: there was no time for the proof.
        """
        most = np.concatenate([tried.astype(float), np.ones(self.n_writers)])
        found = self.optimize.milp(
            self._widen(-self.gains),
            integrality=np.ones(len(most)),
            bounds=self.optimize.Bounds(0, most),
            constraints=[
                self.optimize.LinearConstraint(self.below, -np.inf, 0),
                self.optimize.LinearConstraint(self.size, self.k, self.k),
            ],
            options={"mip_rel_gap": 0.0, **self._time_left()},
        )
        if found.status == _INFEASIBLE:
            return None
        if found.status != _OPTIMAL:
            raise self._unproven(found)
        return found.x[: len(self.table)] > 0.5

    def _widen(self, of_edges: Any) -> Any:
        """A number for each column: those of edges, and 0 for each writer."""
        return np.concatenate([of_edges, np.zeros(self.n_writers)])

    def _time_left(self) -> dict[str, float]:
        if self.time_limit is None:
            return {}
        return {"time_limit": max(1e-3, self.time_limit - (time.monotonic() - self.begun))}

    def _unproven(self, found: Any) -> HookLensError:
        why = f"within time_limit={self.time_limit} seconds" if found.status == _OUT_OF_TIME else f"({found.message})"
        return HookLensError(
            f"the best circuit of {self.k} of {len(self.table)} edges was not found {why}; give it more time, or "
            "choose greedily"
        )


def _conditions(edges: ScoredEdges, table: list[list[int]]) -> list[list[tuple[int, float]]]:
    """What has to be at most 0: for each condition, columns (edges, then writers) and their factors."""
    n_edges = len(table)
    column = {name: index for index, name in enumerate(edges.readers)}
    sources = [[column[reader] for reader in edges.inputs[writer]] for writer in edges.writers]
    leaving: list[list[int]] = [[] for _ in edges.writers]
    entering: dict[int, list[int]] = {}
    fed: dict[int, list[int]] = {}
    for number, (writer, reader) in enumerate(table):
        leaving[writer].append(number)
        entering.setdefault(reader, []).append(number)
    for writer, readers in enumerate(sources):
        for reader in readers:
            fed.setdefault(reader, []).append(writer)
    rows = []
    for number, (writer, reader) in enumerate(table):
        rows.append([(number, 1.0), (n_edges + writer, -1.0)])
        if edges.readers[reader] != "logits":
            rows.append([(number, 1.0), *((n_edges + other, -1.0) for other in fed[reader])])
    for writer, readers in enumerate(sources):
        rows.append([(n_edges + writer, 1.0), *((number, -1.0) for number in leaving[writer])])
        if edges.writers[writer] != "embed":
            inner = [number for reader in readers for number in entering.get(reader, ())]
            rows.append([(n_edges + writer, 1.0), *((number, -1.0) for number in inner)])
    return rows
