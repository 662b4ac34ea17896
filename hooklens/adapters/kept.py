"""Quantised weights as a checkpoint holds them, for whoever computes with them as they are.

A tensor on disk may hold several maps of the network (queries, keys and values). Their rows are taken apart where that
changes no number: rows have scales of their own, or scales of whole blocks inside them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from hooklens.adapters.family import BoundRule
from hooklens.adapters.rules import WeightRule, is_stacked
from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import UnsupportedModelError
from hooklens.weights.layout import stored_view

_WAY_OUT = "leave quantize out, and they are dequantised; quantize='int8' or 'int4' quantises anew what can be"


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of a linear map, `[out, in]`, in the tensors that a way to quantise stores of it.

    Attributes:
        layout: `"int8 rows"`: `entries` `[out, in]` times `scales` `[out]`. `"4-bit blocks"`: `entries`, two in a byte
            and the first in its high half, that index `quant_map`, times `absmax` `[out * in / blocksize]`. `"scaled"`:
            `entries` `[out, in]`, those of 4 bits two in a byte and the first in its low half, less `zeros`
            `[out, groups]` where there are any, times `scales` `[out, groups]`; `groups` `[in]` is the group of each
            input, where they are not of one size and in order.
        shape: outputs and inputs.
        tensors: by their role in it.
        settings: of 4-bit blocks, `blocksize` and `kind` (`"nf4"`, `"fp4"`); of scaled numbers their `kind` (`"uint4"`,
            `"e2m1"`, `"int8"`, `"uint8"`, `"float8_e4m3fn"`, `"float8_e5m2"`).
    """

    layout: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


Kept = QuantisedWeight | tuple[QuantisedWeight, ...]
"""The weight of a linear map, or those of all experts."""


class Rows(NamedTuple):
    """Which rows of a stored map make up another.

    Attributes:
        numbers: which, in order.
        is_whole: all of them, as they are.
    """

    numbers: Tensor
    is_whole: bool

    def take(self, tensor: Tensor, *, dim: int = 0) -> Tensor:
        """The rows of a tensor that has one for each row of the map."""
        return tensor if self.is_whole else tensor.index_select(dim, self.numbers)


def keep_scaled(
    kind: str,
    entries: Tensor,
    scales: Tensor,
    d_in: int,
    *,
    zeros: Tensor | None = None,
    groups: Tensor | None = None,
) -> QuantisedWeight:
    """Numbers and scales, of which the rows have been taken, and the zeros and groups that there are."""
    tensors = {"entries": entries, "scales": scales, "zeros": zeros, "groups": groups}
    held = {role: tensor.contiguous() for role, tensor in tensors.items() if tensor is not None}
    return QuantisedWeight("scaled", (len(entries), d_in), held, {"kind": kind})


def keep_int8(
    entries: Tensor, scales: Tensor, *, zeros: Tensor | None = None, groups: Tensor | None = None
) -> QuantisedWeight:
    """The same of int8 numbers: in the layout that a library multiplies with where a row has a scale and no zero."""
    if zeros is None and scales.shape[1] == 1:
        tensors = {"entries": entries, "scales": scales.flatten().to(torch.float32)}
        return QuantisedWeight("int8 rows", (entries.shape[0], entries.shape[1]), tensors, {})
    return keep_scaled("int8", entries, scales, entries.shape[1], zeros=zeros, groups=groups)


@runtime_checkable
class KeptSource(Protocol):
    """Named tensors of which some are quantised."""

    @property
    def method(self) -> str:
        """The name of the way in which they are."""
        ...

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor is."""
        ...

    def shape_of_map(self, name: str) -> tuple[int, ...]:
        """Outputs and inputs of a quantised one; before them experts, where it holds those of all."""
        ...

    def is_turned(self, name: str) -> bool:
        """Whether the plain checkpoint holds a quantised one as `[in, out]`, behind experts that it may have."""
        ...

    def why_not_kept(self, name: str, rows: Rows) -> str | None:
        """Why rows of a quantised one cannot be taken as they are stored; None where they can."""
        ...

    def keep(self, name: str, rows: Rows) -> Kept:
        """Rows of a quantised one, of every expert where it holds those of all."""
        ...


class KeptMaps:
    """Which of a checkpoint's tensors are kept quantised, and which rows of them go where.

    Args:
        bound: the rules of a checkpoint.
        source: its tensors.
        stored_names: their names there, by those of the rules.
        cfg: the network.
        where: what to call the place in texts of errors.

    Raises:
        UnsupportedModelError: tensors that cannot be kept; all are listed.
    """

    def __init__(
        self,
        bound: Iterable[BoundRule],
        source: object,
        stored_names: Mapping[str, str],
        cfg: HookedConfig,
        *,
        where: str,
    ) -> None:
        if not isinstance(source, KeptSource):
            raise UnsupportedModelError(
                f"{where}: quantize='keep', and the checkpoint's weights are not quantised; take quantize='int8' or "
                "'int4', or leave it out"
            )
        self._source, self._stored_names, self._cfg = source, stored_names, cfg
        # Layers are alike, so most of the answers are known already.
        self._rows: dict[tuple[str, tuple[int, ...]], list[Rows] | None] = {}
        problems = [found for one in bound if self.holds(one) for found in self._check(one)]
        if problems:
            left_out = f" and {len(problems) - 10} more" if len(problems) > 10 else ""
            raise UnsupportedModelError(
                f"{where}: quantize='keep', and {len(problems)} quantised weights ({source.method}) cannot be kept as "
                f"they are: {'; '.join(problems[:10])}{left_out}; {_WAY_OUT}"
            )

    def holds(self, bound: BoundRule) -> bool:
        """Whether a rule is one of quantised tensors."""
        return any(self._source.is_quantised(self._stored_names[hub]) for hub in bound.hubs)

    def read(self, bound: BoundRule) -> list[tuple[str, Kept]]:
        """The network's weights in such a tensor, or in those of all experts."""
        rows = self._rows_of(bound) or []
        return [(name, self._keep(bound, chosen)) for name, chosen in zip(bound.ours, rows, strict=True)]

    def _keep(self, bound: BoundRule, rows: Rows) -> Kept:
        kept = [self._source.keep(self._stored_names[hub], rows) for hub in bound.hubs]
        if not is_stacked(bound.rule):
            return kept[0]
        return cast("tuple[QuantisedWeight, ...]", tuple(kept))

    def _check(self, bound: BoundRule) -> list[str]:
        stored = [self._stored_names[hub] for hub in bound.hubs]
        if plain := [name for name in stored if not self._source.is_quantised(name)]:
            return [f"{plain[0]!r} is not quantised, and other experts are"]
        if len(shapes := sorted({self._source.shape_of_map(name) for name in stored})) > 1:
            return [f"experts such as {stored[0]!r} are of several sizes, {' and '.join(map(str, shapes))}"]
        weights = self._weights(bound)
        n_axes = len(shapes[0]) + is_stacked(bound.rule)
        if not all(_is_linear_map(weight) and len(weight.stored) == n_axes for weight in weights):
            return [f"{stored[0]!r} is no linear map of its own in the network"]
        found = self._rows_of(bound)
        if found is None:
            return [f"{stored[0]!r} holds the numbers of a map in another order"]
        reasons = {self._source.why_not_kept(name, rows): name for name in reversed(stored) for rows in found}
        return [f"{name!r}: {reason}" for reason, name in reasons.items() if reason is not None]

    def _weights(self, bound: BoundRule) -> list[DeclaredWeight]:
        # Layers of the model may be others than those of the checkpoint; a rule's names are of either.
        return [self._cfg.description.weights[name.format(i=bound.source_layer)] for name in bound.rule.ours]

    def _rows_of(self, bound: BoundRule) -> list[Rows] | None:
        stored = self._stored_names[bound.hubs[0]]
        shape = self._source.shape_of_map(stored)
        asked = (bound.rule.hub, shape)
        if asked not in self._rows:
            turned = self._source.is_turned(stored)
            self._rows[asked] = find_rows(bound.rule, self._weights(bound), self._cfg, shape, turned=turned)
        return self._rows[asked]


def _is_linear_map(weight: DeclaredWeight) -> bool:
    return weight.parameter.endswith(".weight") and len(weight.stored) >= 2 and ".table." not in weight.parameter


def find_rows(
    rule: WeightRule, weights: Sequence[DeclaredWeight], cfg: HookedConfig, shape: tuple[int, ...], *, turned: bool
) -> list[Rows] | None:
    """Where a rule takes the rows of its parameters from; None where these are not whole rows, as they are.

    A rule permutes entries, so it takes their numbers along: that of the row, of the column, and of the expert where a
    tensor holds those of all.
    """
    own = 1 if is_stacked(rule) else 0
    rows_at = len(shape) - 2

    def trace(axis: int) -> list[Tensor]:
        # float32, which holds these numbers exactly, is what weights may be of.
        numbers = _along(axis, torch.arange(shape[axis], dtype=torch.float32), len(shape)).expand(shape)
        loaded = rule.load(numbers.mT if turned else numbers, cfg)
        stored = (stored_view(one, of.stored[own:], of.axes[own:]) for one, of in zip(loaded, weights, strict=True))
        return [_collapse(one) for one in stored]

    found = []
    for traced in zip(*map(trace, range(len(shape))), strict=True):
        firsts = tuple(slice(None) if axis == rows_at else slice(1) for axis in range(len(shape)))
        numbers = traced[rows_at][firsts]
        others = (axis for axis in range(len(shape)) if axis != rows_at)
        if not (
            bool((traced[rows_at] == numbers).all())
            and all(_counts(traced[axis], axis, shape[axis]) for axis in others)
        ):
            return None
        rows = numbers.flatten().long()
        found.append(Rows(rows, torch.equal(rows, torch.arange(shape[rows_at]))))
    return found


def _along(axis: int, numbers: Tensor, n_axes: int) -> Tensor:
    return numbers.view([-1 if place == axis else 1 for place in range(n_axes)])


def _collapse(tensor: Tensor) -> Tensor:
    """The tensor without the repetitions of an expanded one: experts may be many, and large."""
    return tensor[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]


def _counts(traced: Tensor, axis: int, size: int) -> bool:
    """Whether the numbers of an axis are all there, in order along it."""
    numbers = _along(axis, torch.arange(size, dtype=traced.dtype), traced.ndim)
    return traced.shape[axis] == size and bool((traced == numbers).all())
