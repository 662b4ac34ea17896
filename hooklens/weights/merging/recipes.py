"""How each method merges a weight: its formula over the pieces of the weight, and what it has to know before.

A recipe takes the operands of a merge and gives a function from a weight's name to its merged pieces, to be asked for
in the order of `operands.names`.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.weights.merging.formulas import Agreement, arc_shares, average, drop, merge_agreeing
from hooklens.weights.merging.operands import Operands
from hooklens.weights.merging.trimming import find_trim

MergeWeight = Callable[[str], Iterable[Float[Tensor, " entry"]]]
"""Gives a weight's merged pieces, by its name."""

Recipe = Callable[[Operands], MergeWeight]

Deltas = Callable[[int, str, slice], Float[Tensor, " entry"]]
"""Gives a piece of one model's task vector: what training changed, `theta_i - theta_base`."""

DeltaRecipe = Callable[[Operands, Deltas], MergeWeight]


def weigh(operands: Operands, *, shares: Sequence[float]) -> MergeWeight:
    """`sum_i shares[i] theta_i`."""

    def merge_weight(name: str) -> Iterator[Tensor]:
        for span in operands.spans(name):
            yield average((operands.read(model, name, span) for model in range(len(shares))), shares)

    return merge_weight


def turn(operands: Operands, *, t: float) -> MergeWeight:
    """Of two models, each weight on the arc from one to the other.

    A weight is looked at three times: for the lengths of the two vectors, for the angle between them, to merge.
    """

    def lengths(name: str, combine: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> tuple[float, float]:
        sums = []
        for span in operands.spans(name):
            made = combine(operands.read(0, name, span), operands.read(1, name, span))
            sums.append([float(one.square().sum()) for one in made])
        first, second = (math.sqrt(math.fsum(column)) for column in zip(*sums, strict=True))
        return first, second

    def merge_weight(name: str) -> Iterator[Tensor]:
        shares = 1 - t, t
        if operands.outlines[name].n_entries:
            one, other = lengths(name, lambda first, second: (first, second))
            # A vector of length 0 has no direction: the straight line is taken.
            if one and other:
                chord, doubled = lengths(
                    name, lambda first, second: (first / one - second / other, first / one + second / other)
                )
                shares = arc_shares(chord, doubled, t)
        return iter(weigh(operands, shares=shares)(name))

    return merge_weight


def add_deltas(operands: Operands, *, scaling_factor: float, recipe: DeltaRecipe) -> MergeWeight:
    """The base, which is the first of the operands, with merged task vectors added."""

    def delta(model: int, name: str, span: slice) -> Tensor:
        return operands.read(model + 1, name, span) - operands.read(0, name, span)

    merge_delta = recipe(operands, delta)

    def merge_weight(name: str) -> Iterator[Tensor]:
        for span, piece in zip(operands.spans(name), merge_delta(name), strict=True):
            yield operands.read(0, name, span).add(piece, alpha=scaling_factor)

    return merge_weight


def add_up(operands: Operands, deltas: Deltas) -> MergeWeight:
    """The sum of task vectors."""
    n_models = len(operands.models) - 1

    def merge_weight(name: str) -> Iterator[Tensor]:
        for span in operands.spans(name):
            yield average((deltas(model, name, span) for model in range(n_models)), [1.0] * n_models)

    return merge_weight


def elect(operands: Operands, deltas: Deltas, *, density: float, agreement: Agreement) -> MergeWeight:
    """Trimmed task vectors, of which those entries are put together that agree with the elected sign.

    What stays of a task vector is found first, of all weights together.
    """

    def all_of(model: int) -> Iterator[Tensor]:
        return (deltas(model, name, span) for name in operands.names for span in operands.spans(name))

    n_kept, n_models = int(density * operands.n_entries), len(operands.models) - 1
    trims = [find_trim(partial(all_of, model), n_kept) for model in range(n_models)]

    def merge_weight(name: str) -> Iterator[Tensor]:
        for span in operands.spans(name):
            yield merge_agreeing([trim(deltas(model, name, span)) for model, trim in enumerate(trims)], agreement)

    return merge_weight


def thin(
    operands: Operands, deltas: Deltas, *, sparsity: float, rescale: bool, seed: int, then: DeltaRecipe
) -> MergeWeight:
    """Task vectors of which entries are dropped at random, merged by another recipe.

    The draws of each weight of each model have a seed of their own, and are the same whenever it is looked at.
    """
    generators: dict[int, torch.Generator] = {}

    def thinned(model: int, name: str, span: slice) -> Tensor:
        if span.start == 0:
            digest = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
            generators[model] = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return drop(deltas(model, name, span), sparsity, generators[model], rescale=rescale)

    return then(operands, thinned)
