"""Norms over the last axis."""

from dataclasses import dataclass
from typing import Literal, get_args

from hooklens.config.checks import check_choice, check_numbers
from hooklens.errors import ConfigError

NormKind = Literal["layer", "rms"]


@dataclass(frozen=True, kw_only=True)
class NormConfig:
    """A norm over the last axis.

    Attributes:
        kind: `"layer"` (centre, scale, weight, bias) or `"rms"` (scale, weight; Zhang and Sennrich 2019).
        eps: added to the variance or mean square before the root.
        bias: whether a LayerNorm has a bias `b`.
        unit_offset: the weight acts as `1 + w`.
    """

    kind: NormKind
    eps: float
    bias: bool = True
    unit_offset: bool = False

    def __post_init__(self) -> None:
        check_choice("norm kind", self.kind, get_args(NormKind))
        check_numbers("norm", {"eps": self.eps}, at_least=0.0)
        if self.kind == "rms" and self.bias:
            raise ConfigError("an RMSNorm has no bias: set bias=False")
