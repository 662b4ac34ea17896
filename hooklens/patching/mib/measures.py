"""MIB's measures of a faithfulness curve (Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark").

With `f(x)` the faithfulness (Hanna et al. 2024) of the circuit of a fraction `x` of all edges, at ten fractions,

    CPR = integral of f(x) dx            how well circuits do what the network is good at; the more the better
    CMD = integral of abs(1 - f(x)) dx   how far circuits are from the network; 0 at best

both from 0.001 to 1 by the trapezoidal rule, so the largest circuits weigh most: a curve that is 1 everywhere has a CPR
of 0.999 and a CMD of 0. A circuit has `int(x * edges)` edges; in a small network the smallest have none.
"""

from collections.abc import Sequence
from itertools import pairwise

from hooklens.arguments import read_int, reads, require
from hooklens.errors import InputError

MIB_FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The sizes of circuits, as fractions of all edges."""


@reads()
def mib_sizes(n_edges: int) -> tuple[int, ...]:
    """The numbers of edges of MIB's ten circuits of a network, 0 among them where it is small.

    Raises:
        InputError: no number of edges.
    """
    total = read_int(n_edges, what="mib_sizes: n_edges", least=1)
    return tuple(int(fraction * total) for fraction in MIB_FRACTIONS)


@reads()
def circuit_performance_ratio(faithfulness: Sequence[float], *, fractions: Sequence[float] = MIB_FRACTIONS) -> float:
    """CPR: the area under the faithfulness of circuits over the fraction of edges that they have.

    Args:
        faithfulness: of each circuit.
        fractions: what part of all edges each has, in rising order.

    Raises:
        InputError: not one faithfulness for each of at least two fractions that rise from above 0 to at most 1.
    """
    return _integrate(faithfulness, fractions, "circuit_performance_ratio")


@reads()
def circuit_model_distance(faithfulness: Sequence[float], *, fractions: Sequence[float] = MIB_FRACTIONS) -> float:
    """CMD: the area between the faithfulness of circuits and 1, over the fraction of edges that they have.

    The distance is taken at the circuits: between one above 1 and one below, the line does not cross 1 on its way.

    Args:
        faithfulness, fractions: as for `circuit_performance_ratio`.

    Raises:
        InputError: as there.
    """
    kept = require(
        faithfulness, kind=(list, tuple), what="circuit_model_distance: faithfulness", expected="a list of numbers"
    )
    return _integrate([abs(1.0 - one) for one in kept], fractions, "circuit_model_distance")


def _integrate(values: Sequence[float], fractions: Sequence[float], what: str) -> float:
    for name, given in (("faithfulness", values), ("fractions", fractions)):
        require(given, kind=(list, tuple), what=f"{what}: {name}", expected="a list of numbers")
    rising = (
        all(x < y for x, y in pairwise(fractions)) and len(fractions) > 1 and fractions[0] >= 0 and fractions[-1] <= 1
    )
    if not rising or len(values) != len(fractions):
        raise InputError(
            f"{what}: {len(values)} circuits with the fractions {list(fractions)}; expected one faithfulness for each "
            "of two or more fractions that rise, 0 to 1"
        )
    points = list(zip(fractions, values, strict=True))
    pieces = [(y - x) * (f + g) / 2 for (x, f), (y, g) in pairwise(points)]
    return sum(pieces)
