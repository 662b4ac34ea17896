"""Quantised weights as a checkpoint holds them, for whoever computes with them as they are.

A tensor on disk may hold several maps of the network (queries, keys and values). Their rows are taken apart where that
changes no number: rows have scales of their own, or scales of whole blocks inside them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.adapters.family import BoundRule
from hooklens.adapters.rules import is_stacked
from hooklens.config import DeclaredWeight, HookedConfig
from hooklens.errors import UnsupportedModelError
from hooklens.weights.layout import stored_view

_WAY_OUT = "leave quantize out, and they are dequantised; quantize='int8' or 'int4' quantises anew what can be"


@dataclass(frozen=True)
class QuantisedWeight:
    """The weight of a linear map, `[out, in]`, in the tensors that a way to quantise stores of it.

    Attributes:
        layout: `"int8 rows"`: `entries` `[out, in]` times `scales` `[out]`. `"4-bit blocks"`: `entries`, two in a byte
            and the first in its high half, that index `quant_map`, times `absmax` `[out * in / blocksize]`.
        shape: outputs and inputs.
        tensors: by their role in it.
        settings: of 4-bit blocks, `blocksize` and `kind` (`"nf4"`, `"fp4"`).
    """

    layout: str
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


class Rows(NamedTuple):
    """Which rows of a stored map make up another.

    Attributes:
        numbers: which, in order.
        is_whole: all of them, as they are.
    """

    numbers: Tensor
    is_whole: bool


@runtime_checkable
class KeptSource(Protocol):
    """Named tensors of which some are quantised."""

    @property
    def method(self) -> str:
        """The name of the way in which they are."""

    @property
    def can_be_kept(self) -> bool:
        """Whether a library that HookLens uses computes with such weights."""

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor is."""

    def shape_of_map(self, name: str) -> tuple[int, ...]:
        """Outputs and inputs of a quantised one."""

    def is_turned(self, name: str) -> bool:
        """Whether the plain checkpoint holds a quantised one as `[in, out]`."""

    def why_not_kept(self, name: str, rows: Rows) -> str | None:
        """Why rows of a quantised one cannot be taken as they are stored; None where they can."""

    def keep(self, name: str, rows: Rows) -> QuantisedWeight:
        """Rows of a quantised one."""


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
        if not source.can_be_kept:
            raise UnsupportedModelError(
                f"{where}: quantize='keep', and no library that HookLens uses computes with {source.method} weights as "
                f"they are; {_WAY_OUT}"
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

    def read(self, bound: BoundRule) -> list[tuple[str, QuantisedWeight]]:
        """The network's weights in such a tensor."""
        stored = self._stored_names[bound.hubs[0]]
        rows = self._rows_of(bound) or []
        return [(name, self._source.keep(stored, chosen)) for name, chosen in zip(bound.ours, rows, strict=True)]

    def _check(self, bound: BoundRule) -> list[str]:
        stored = self._stored_names[bound.hubs[0]]
        weights = self._weights(bound)
        if is_stacked(bound.rule) or not all(map(_is_linear_map, weights)):
            return [f"{stored!r} is no linear map of its own in the network"]
        found = self._rows_of(bound)
        if found is None:
            return [f"{stored!r} holds the numbers of a map in another order"]
        reasons = (self._source.why_not_kept(stored, rows) for rows in found)
        return [f"{stored!r}: {reason}" for reason in dict.fromkeys(reasons) if reason is not None]

    def _weights(self, bound: BoundRule) -> list[DeclaredWeight]:
        # Layers of the model may be others than those of the checkpoint; a rule's names are of either.
        return [self._cfg.description.weights[name.format(i=bound.source_layer)] for name in bound.rule.ours]

    def _rows_of(self, bound: BoundRule) -> list[Rows] | None:
        stored = self._stored_names[bound.hubs[0]]
        shape = self._source.shape_of_map(stored)
        asked = (bound.rule.hub, shape)
        if asked not in self._rows:
            turned = self._source.is_turned(stored)
            self._rows[asked] = find_rows(bound, self._weights(bound), self._cfg, shape, turned=turned)
        return self._rows[asked]


def _is_linear_map(weight: DeclaredWeight) -> bool:
    return weight.parameter.endswith(".weight") and len(weight.stored) == 2 and ".table." not in weight.parameter


def find_rows(
    bound: BoundRule, weights: Sequence[DeclaredWeight], cfg: HookedConfig, shape: tuple[int, ...], *, turned: bool
) -> list[Rows] | None:
    """Where a rule takes the rows of its parameters from; None where these are not whole rows, as they are.

    A rule permutes entries, so it takes their numbers along.
    """
    d_out, d_in = shape
    # float32, which holds these numbers exactly, is what weights may be of.
    columns = torch.arange(d_in, dtype=torch.float32)

    def trace(numbers: Tensor) -> list[Tensor]:
        loaded = bound.load(lambda name: numbers.T if turned else numbers, cfg)
        return [stored_view(one, weight.stored, weight.axes) for one, weight in zip(loaded, weights, strict=True)]

    found = []
    rows = trace(torch.arange(d_out, dtype=torch.float32)[:, None].expand(shape))
    for row, column in zip(rows, trace(columns.expand(shape)), strict=True):
        if row.shape[1] != d_in or not (bool((column == columns).all()) and bool((row == row[:, :1]).all())):
            return None
        numbers = row[:, 0].long()
        found.append(Rows(numbers, torch.equal(numbers, torch.arange(d_out))))
    return found
