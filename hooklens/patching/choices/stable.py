"""Edges that pairs of prompts agree on: chosen again when pairs are drawn anew.

Bootstrap: as many pairs as there are, drawn with replacement, give scores of their own, and these a circuit. An edge
that most draws choose does not hang on single pairs (Nikankin et al. 2025, "Improving Circuit Faithfulness via Better
Edge Selection", keep the edges whose interval has one sign).
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.patching.choices.choice import EdgeChoice
from hooklens.patching.choices.scored import ScoredEdges


def selection_frequency(
    edges: ScoredEdges,
    per_pair: Float[Tensor, "writer reader pair"],
    k: int,
    *,
    choice: EdgeChoice,
    n_draws: int,
    seed: int,
) -> Float[Tensor, "writer reader"]:
    """How often an edge is among the `k` chosen, over draws of pairs with replacement.

    Args:
        edges: the edges.
        per_pair: their scores, signed as those of `edges`.
        k: how many edges are chosen in each draw.
        choice: how.
        n_draws: draws of pairs.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    n_pairs = per_pair.shape[-1]
    counts = torch.zeros(edges.exists.shape, dtype=torch.float64, device=edges.exists.device)
    for _ in range(n_draws):
        drawn = torch.randint(n_pairs, (n_pairs,), generator=generator)
        weights = torch.bincount(drawn, minlength=n_pairs).to(per_pair)
        scores = replace(edges, scores=(per_pair.nan_to_num(0.0) @ weights) / n_pairs)
        counts += edges.to_mask(choice.circuit(scores, k))
    return counts / n_draws
