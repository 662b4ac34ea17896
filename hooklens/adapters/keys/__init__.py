"""Config parts: what a family's config map is put together from."""

from hooklens.adapters.keys.config_map import ConfigMap
from hooklens.adapters.keys.mixtures import (
    INERT_ROUTER_KEYS,
    MixtureKeys,
    every_few_layers,
    layers_in,
    norm_topk_key,
    stepped_mixture_keys,
)
from hooklens.adapters.keys.norms import norm_key
from hooklens.adapters.keys.parts import SIZE_KEYS, ActivationKey, BiasFlag, Computed, ConfigPart, Derived, Key
from hooklens.adapters.keys.positions import LearnedPositionKeys, PositionKeys
from hooklens.adapters.keys.reader import REQUIRED, ConfigReader
from hooklens.adapters.keys.scales import MULTIPLIER_KEYS
from hooklens.adapters.keys.windows import LayeredRotary, WindowKeys

__all__ = [
    "INERT_ROUTER_KEYS",
    "MULTIPLIER_KEYS",
    "REQUIRED",
    "SIZE_KEYS",
    "ActivationKey",
    "BiasFlag",
    "Computed",
    "ConfigMap",
    "ConfigPart",
    "ConfigReader",
    "Derived",
    "Key",
    "LayeredRotary",
    "LearnedPositionKeys",
    "MixtureKeys",
    "PositionKeys",
    "WindowKeys",
    "every_few_layers",
    "layers_in",
    "norm_key",
    "norm_topk_key",
    "stepped_mixture_keys",
]
