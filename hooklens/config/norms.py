"""Norms over the last axis."""

from dataclasses import dataclass
from typing import Literal, get_args

from hooklens.config.checks import check_choice, check_flags, check_numbers, check_present, refuse

NormKind = Literal["layer", "rms"]


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A norm over the last axis.

    Attributes:
        kind: `"layer"` (centre, scale, weight, bias) or `"rms"` (scale, weight; Zhang and Sennrich 2019).
        eps: added to the variance or mean square before the root.
        weight: whether it has a weight `w`. Without weight and bias it centres and scales only.
        bias: whether a LayerNorm has a bias `b`.
        unit_offset: the weight acts as `1 + w`; a LayerNorm with it is LayerNorm1p.
        wide_weight: on half-precision inputs weight and bias act in float32, before the output is rounded,
            not in their own dtype. Nothing else changes with it.
    """

    kind: NormKind
    eps: float
    weight: bool = True
    bias: bool = True
    unit_offset: bool = False
    wide_weight: bool = False

    def __post_init__(self) -> None:
        check_choice("norm kind", self.kind, get_args(NormKind))
        check_present("norm", {"eps": self.eps})
        check_numbers("norm", {"eps": self.eps}, at_least=0.0)
        flags = ("weight", "bias", "unit_offset", "wide_weight")
        check_flags("norm", {name: getattr(self, name) for name in flags})
        problems = []
        if self.kind == "rms" and self.bias:
            problems.append("an RMSNorm has no bias: set bias=False")
        if self.unit_offset and not self.weight:
            problems.append("unit_offset=True is how a weight acts: it needs weight=True")
        if self.wide_weight and not (self.weight or self.bias):
            problems.append("wide_weight=True is how weight and bias act: it needs one of them")
        refuse(problems, "norm")
