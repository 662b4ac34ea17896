"""Distances of two models' weights: each weight by itself, and those of a block together."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.axes import layer_of
from hooklens.causal_lm import HookedCausalLM

# Entries converted at a time: 32 MiB in float64.
_CHUNK_ENTRIES = 2**22
_TIED = "unembed.W_U"


@dataclass(frozen=True)
class WeightSums:
    """Sums over entries of two weights `a` and `b`, which add up over several weights.

    Attributes:
        difference: of `(b - a)^2`.
        first: of `a^2`.
        second: of `b^2`.
        dot: of `a b`.
    """

    difference: float = 0.0
    first: float = 0.0
    second: float = 0.0
    dot: float = 0.0

    def __add__(self, other: "WeightSums") -> "WeightSums":
        return WeightSums(
            self.difference + other.difference,
            self.first + other.first,
            self.second + other.second,
            self.dot + other.dot,
        )

    @property
    def relative_norm(self) -> float:
        """`||b - a|| / ||a||`; 0 where both are 0."""
        if self.difference == 0:
            return 0.0
        return math.sqrt(self.difference / self.first) if self.first else self.difference * math.inf

    @property
    def cosine(self) -> float:
        """The cosine between the flattened weights; NaN where one of them is 0."""
        size = math.sqrt(self.first) * math.sqrt(self.second)
        return self.dot / size if size else math.nan


_UNKNOWN = WeightSums(*[math.nan] * 4)


def compare_weights(first: HookedCausalLM, second: HookedCausalLM) -> dict[str, WeightSums]:
    """The sums of each weight that one of the models has; NaN where the other has none of that name and shape.

    Quantised weights count as what they stand for. A tied unembedding is the embedding's, and counted there.
    """
    ours, theirs = first.named_weights(), second.named_weights()
    names = dict.fromkeys([*ours, *theirs])
    if first.cfg.tied_unembed and second.cfg.tied_unembed:
        names.pop(_TIED, None)
    return {name: _compare(ours, theirs, name) for name in names}


def sum_by_layer(sums: Mapping[str, WeightSums]) -> dict[int | None, WeightSums]:
    """All weights of a block together; under None those outside the blocks."""
    layers: dict[int | None, WeightSums] = {}
    for name, one in sums.items():
        layer = layer_of(name)
        layers[layer] = layers.get(layer, WeightSums()) + one
    return layers


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], name: str) -> WeightSums:
    if name not in ours or name not in theirs:
        return _UNKNOWN
    one, other = ours[name], theirs[name]
    if one.shape != other.shape:
        return _UNKNOWN
    total = WeightSums()
    for a, b in _chunks(one, other):
        total = total + WeightSums(
            float((b - a).square().sum()), float(a.square().sum()), float(b.square().sum()), float((a * b).sum())
        )
    return total


def _chunks(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of both at a time, in float64 on the CPU."""
    step = max(1, _CHUNK_ENTRIES * len(one) // max(1, one.numel()))
    for start in range(0, len(one), step):
        a, b = one[start : start + step], other[start : start + step]
        yield a.to("cpu", torch.float64), b.to("cpu", torch.float64)
