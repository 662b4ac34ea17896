"""Config parts: what a family's config map is put together from."""

from hooklens.adapters.keys.config_map import ConfigMap
from hooklens.adapters.keys.norms import norm_key
from hooklens.adapters.keys.parts import (
    SHORT_SIZE_KEYS,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    Computed,
    ConfigPart,
    Derived,
    Key,
    embed_scale_flag,
)
from hooklens.adapters.keys.positions import FixedPositionKeys, PositionKeys, rotary_dim_keys
from hooklens.adapters.keys.reader import REQUIRED, ConfigReader
from hooklens.adapters.keys.windows import LayeredRotary, WindowKeys

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
    "FixedPositionKeys",
    "Key",
    "LayeredRotary",
    "PositionKeys",
    "WindowKeys",
    "embed_scale_flag",
    "norm_key",
    "rotary_dim_keys",
]
