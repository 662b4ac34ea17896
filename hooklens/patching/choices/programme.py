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

scipy's solver (HiGHS) proves that what it finds is the best. It takes about a second for two thousand edges; for the
32,491 of 12 layers with 12 heads, 40 seconds of one core were not enough, so give it a limit there.
"""

import numpy as np

from hooklens.errors import HookLensError
from hooklens.optional import import_package
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit

_OPTIMAL, _OUT_OF_TIME, _INFEASIBLE = 0, 1, 2


def solve(edges: ScoredEdges, k: int, *, signed: bool, time_limit: float | None) -> Circuit:
    """The circuit of exactly `k` edges, all on paths from the embeddings to the logits, with the largest sum of scores.

    Raises:
        HookLensError: there is none of this size, or the limit came before the proof that it is the best.
        MissingDependencyError: scipy is not installed.
    """
    if k == 0:
        return Circuit()
    optimize, sparse = import_package("scipy.optimize"), import_package("scipy.sparse")
    table = edges.exists.nonzero().tolist()
    n_edges, n_writers = len(table), len(edges.writers)
    strength = edges.strength(signed=signed)
    gains = [float(strength[writer, reader]) for writer, reader in table]
    rows = _conditions(edges, table)
    data = [(number, column, value) for number, row in enumerate(rows) for column, value in row]
    numbers, columns, values = zip(*data, strict=True)
    below = sparse.csr_matrix((values, (numbers, columns)), shape=(len(rows), n_edges + n_writers))
    size = np.concatenate([np.ones(n_edges), np.zeros(n_writers)])[None]
    # Scores may be small; the solver's tolerances are those of numbers around 1.
    scale = max(map(abs, gains)) or 1.0
    found = optimize.milp(
        np.concatenate([-np.array(gains) / scale, np.zeros(n_writers)]),
        integrality=np.ones(n_edges + n_writers),
        bounds=optimize.Bounds(0, 1),
        constraints=[optimize.LinearConstraint(below, -np.inf, 0), optimize.LinearConstraint(size, k, k)],
        options={"mip_rel_gap": 0.0} | ({} if time_limit is None else {"time_limit": time_limit}),
    )
    if found.status == _INFEASIBLE:
        raise HookLensError(
            f"no circuit of exactly {k} edges has all of them on paths from the embeddings to the logits; ask for "
            "another size"
        )
    if found.status != _OPTIMAL:
        why = f"within time_limit={time_limit} seconds" if found.status == _OUT_OF_TIME else f"({found.message})"
        raise HookLensError(
            f"the best circuit of {k} of {n_edges} edges was not found {why}; give it more time, or choose greedily"
        )
    return Circuit(
        (edges.writers[writer], edges.readers[reader])
        for (writer, reader), chosen in zip(table, found.x[:n_edges], strict=True)
        if chosen > 0.5
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
