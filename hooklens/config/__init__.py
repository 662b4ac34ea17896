"""The description of a network, and of each of its layers; frozen values, checked when made."""

from hooklens.config.activations import Activation
from hooklens.config.attention import AttentionBackend, NormOver, QueryTemperature
from hooklens.config.block import BlockConfig, Option, PartConfig
from hooklens.config.description import DeclaredWeight, Description, describe_with
from hooklens.config.latent import MLAConfig
from hooklens.config.moe import MoEConfig
from hooklens.config.network import HookedConfig, Origin
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
    ShortformerPositions,
    SinusoidalLayout,
    SinusoidalPositions,
)
from hooklens.config.settling import InitScheme, Wiring
from hooklens.config.stream import DROPOUTS, refuse_other_outputs

__all__ = [
    "DROPOUTS",
    "Activation",
    "AlibiPositions",
    "AttentionBackend",
    "BlockConfig",
    "DeclaredWeight",
    "Description",
    "HookedConfig",
    "InitScheme",
    "LearnedPositions",
    "MLAConfig",
    "MoEConfig",
    "NoPositions",
    "NormConfig",
    "NormKind",
    "NormOver",
    "Option",
    "Origin",
    "PartConfig",
    "Positions",
    "QueryTemperature",
    "RotaryLayout",
    "RotaryPositions",
    "RotaryScaling",
    "RotaryScalingKind",
    "ShortformerPositions",
    "SinusoidalLayout",
    "SinusoidalPositions",
    "Wiring",
    "describe_with",
    "refuse_other_outputs",
]
