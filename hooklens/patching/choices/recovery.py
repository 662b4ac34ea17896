"""How well scores recover a circuit that is known."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.arguments import reads
from hooklens.errors import HookLensError
from hooklens.patching.choices.scored import ScoredEdges
from hooklens.patching.graph.circuit import Circuit


@reads()
def edge_auroc(found: ScoredEdges | Circuit, known: Circuit, *, edges: ScoredEdges | None = None) -> float:
    """The area under the receiver operating characteristic of scores, against a circuit that is known.

    It is the probability that an edge of the circuit has a larger score, by absolute value, than an edge outside it,
    a tie counting one half (Mann-Whitney): 1 where scores tell them apart, 0.5 for chance. A circuit in place of
    scores, as `discover_circuit` finds one, has the score 1 for its edges and 0 for others.

    Mueller et al. 2025 ("MIB") measure it on a network whose circuit is known, at ten sizes of circuits; this is the
    area over all sizes.

    Args:
        found: scores or a circuit.
        known: the edges that belong to the circuit.
        edges: the edges of the network, where `found` is a circuit; any scores of its edges will do.

    Raises:
        HookLensError: the known circuit is empty or holds all edges; or edges are not given, or twice.
        SiteError: a circuit has edges that are none of the network's.
    """
    if isinstance(found, Circuit) != (edges is not None):
        raise HookLensError(
            "edge_auroc: edges= says which edges there are where found is a circuit, and only there; scores know theirs"
        )
    table = found if isinstance(found, ScoredEdges) else edges
    assert table is not None
    truth = table.to_mask(known)[table.exists]
    if isinstance(found, Circuit):
        strength = table.to_mask(found)[table.exists].double()
    else:
        strength = found.strength(signed=False)[found.exists].double()
    if truth.all() or not truth.any():
        raise HookLensError(
            f"edge_auroc: the known circuit holds {int(truth.sum())} of {truth.numel()} edges; there are no two kinds "
            "of edges to tell apart"
        )
    return _rank_auroc(strength, truth)


def _rank_auroc(strength: Float[Tensor, " edge"], truth: Bool[Tensor, " edge"]) -> float:
    """The share of pairs in the right order, from the sum of ranks, equal values having the mean of theirs."""
    ranks = _ranks(strength)
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    return float((ranks[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


@reads()
def overlap(circuit: Circuit, other: Circuit) -> float:
    """The Jaccard index of two circuits: edges in both over edges in any; 1 for two empty ones."""
    union = len(circuit | other)
    return len(circuit & other) / union if union else 1.0


@reads()
def rank_correlation(scores: ScoredEdges, other: ScoredEdges) -> float:
    """Spearman's rank correlation of the strength of edges, equal ones having the mean of their ranks.

    Raises:
        HookLensError: scores of different networks, or of which all edges have the same.
    """
    if (scores.writers, scores.readers) != (other.writers, other.readers):
        raise HookLensError("rank_correlation: the scores are of different networks")
    ranks = torch.stack([_ranks(one.strength(signed=False)[one.exists].double()) for one in (scores, other)])
    centred = ranks - ranks.mean(1, keepdim=True)
    spread = centred.square().sum(1).sqrt().prod()
    if float(spread) == 0:
        raise HookLensError("rank_correlation: all edges have the same score, which has no order")
    return float((centred[0] * centred[1]).sum() / spread)


def _ranks(values: Float[Tensor, " edge"]) -> Float[Tensor, " edge"]:
    """Ranks from 1, equal values having the mean of theirs."""
    ordered = values.sort().values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2
