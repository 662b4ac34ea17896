"""Pairs that a discovery does not see, and its circuit is measured on."""

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.arguments import read_number
from hooklens.errors import InputError
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import PromptPairs


def read_holdout(given: object, *, what: str) -> float:
    """The share of pairs to hold out.

    Raises:
        InputError: no number from 0 to below 1.
    """
    return read_number(
        given, what=f"{what}: holdout", expected="a share from 0 to below 1", allows=lambda found: 0 <= found < 1
    )


def draw_held_out(prompts: PromptPairs, metric: Metric, share: float, seed: int, *, what: str) -> Bool[Tensor, " pair"]:
    """Which pairs are held out: at least one where any share is; the draws of noise for one prompt stay together.

    Args:
        prompts: the pairs.
        metric: what is measured.
        share: how many of them.
        seed: draws them.
        what: the function that was called.

    Raises:
        InputError: none would be left, or the metric sees all pairs at once.
    """
    if share and metric.needs_all_pairs:
        raise InputError(
            f"{what}: metric {metric.name} is a function that sees all pairs at once, so none can be held out; pass "
            "holdout=0 and measure the circuit on other prompts, or use a metric such as patching.LogitDiff"
        )
    held_out, apart = torch.zeros(len(prompts), dtype=torch.bool), prompts.apart
    n_held_out = max(1, round(share * len(apart))) if share else 0
    if n_held_out >= len(apart):
        raise InputError(
            f"{what}: holdout={share} of {len(apart)} pairs leaves none to find a circuit on; give more pairs, or "
            "holdout=0"
        )
    order = torch.randperm(len(apart), generator=torch.Generator().manual_seed(seed))
    for place in order[:n_held_out].tolist():
        held_out[apart[place]] = True
    return held_out
