"""Config parts: what a family's config map is put together from."""

from hooklens.adapters.keys.config_map import ConfigMap
from hooklens.adapters.keys.norms import norm_key, qk_norm_flag
from hooklens.adapters.keys.parts import (
    SHORT_SIZE_KEYS,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    Computed,
    ConfigPart,
    Derived,
    EmbedScaleFlag,
    Key,
)
from hooklens.adapters.keys.positions import FixedPositionKeys, PositionKeys, RotaryDimKeys
from hooklens.adapters.keys.reader import REQUIRED, ConfigReader
from hooklens.adapters.keys.windows import LayeredRotary, WindowKeys, late_layers

__all__ = [
    "REQUIRED",
    "SHORT_SIZE_KEYS",
    "SIZE_KEYS",
    "ActivationKey",
    "BiasFlag",
    "Computed",
    "ConfigMap",
    "ConfigPart",
    "ConfigReader",
    "Derived",
    "EmbedScaleFlag",
    "FixedPositionKeys",
    "Key",
    "LayeredRotary",
    "PositionKeys",
    "RotaryDimKeys",
    "WindowKeys",
    "late_layers",
    "norm_key",
    "qk_norm_flag",
]
