"""The sizes of a curve's circuits, and the circuits of these sizes."""

import math
from collections.abc import Iterable

import torch

from hooklens.arguments import read_int, show
from hooklens.errors import InputError
from hooklens.patching.choices.choice import EdgeChoice
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.mib.measures import MIB_FRACTIONS, mib_sizes
from hooklens.patching.results.edge_scores import EdgeScores

MIB_LABELS = tuple(f"{fraction:g}" for fraction in MIB_FRACTIONS)
_N_SIZES = 20


def choose_circuits(scores: EdgeScores | ScoredEdges, choice: EdgeChoice, sizes: object) -> dict[int | str, Circuit]:
    """The circuits of a curve by label, the smallest first.

    Raises:
        InputError: sizes that are none.
    """
    n_edges = int(scores.exists.sum())
    by_label: dict[int | str, int]
    if isinstance(sizes, str) and sizes == "mib":
        by_label = dict(zip(MIB_LABELS, mib_sizes(n_edges), strict=True))
    else:
        by_label = {size: size for size in (_log_sizes(n_edges) if sizes is None else _read_sizes(sizes))}
    outside = [size for size in by_label.values() if not 0 <= size <= n_edges]
    if outside or not by_label:
        raise InputError(
            f"faithfulness_curve: sizes {outside or []}; expected numbers of edges from 0 to {n_edges}, or 'mib'"
        )
    made = {
        size: scores.circuit(size, choice=choice) if isinstance(scores, EdgeScores) else choice.circuit(scores, size)
        for size in set(by_label.values())
    }
    return {label: made[size] for label, size in by_label.items()}


def _read_sizes(sizes: object) -> list[int]:
    if isinstance(sizes, str) or not isinstance(sizes, Iterable):
        raise InputError(f"faithfulness_curve: sizes are {show(sizes)}; expected a list of numbers of edges, or 'mib'")
    return sorted({read_int(size, what="faithfulness_curve: a size") for size in sizes})


def _log_sizes(n_edges: int) -> list[int]:
    exponents = torch.linspace(0.0, math.log(n_edges), _N_SIZES, dtype=torch.float64)
    return sorted({round(size) for size in exponents.exp().tolist()})
