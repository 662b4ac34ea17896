"""The description of a network, and of each of its layers; frozen values, checked when made."""

from hooklens.config.block import BlockConfig, Option, PartConfig
from hooklens.config.description import DeclaredWeight, Description, describe_with
from hooklens.config.network import Activation, HookedConfig, Origin, Wiring
from hooklens.config.norms import NormConfig, NormKind
from hooklens.config.positions import (
    AlibiPositions,
    LearnedPositions,
    NoPositions,
    Positions,
    RotaryLayout,
    RotaryPositions,
    RotaryScaling,
    RotaryScalingKind,
)

__all__ = [
    "Activation",
    "AlibiPositions",
    "BlockConfig",
    "DeclaredWeight",
    "Description",
    "HookedConfig",
    "LearnedPositions",
    "NoPositions",
    "NormConfig",
    "NormKind",
    "Option",
    "Origin",
    "PartConfig",
    "Positions",
    "RotaryLayout",
    "RotaryPositions",
    "RotaryScaling",
    "RotaryScalingKind",
    "Wiring",
    "describe_with",
]
