"""Config parts: what a family's config map is put together from."""

from hooklens.adapters.keys.config_map import ConfigMap
from hooklens.adapters.keys.latents import LatentKeys, LatentPositionKeys, gate_scale_key, late_mixture_keys
from hooklens.adapters.keys.mixtures import (
    INERT_ROUTER_KEYS,
    MixtureKeys,
    every_few_layers,
    layers_in,
    norm_topk_key,
    stepped_mixture_keys,
)
from hooklens.adapters.keys.norms import QK_NORM, norm_key, qk_norm_flag
from hooklens.adapters.keys.parts import (
    ROOT_EMBED_SCALE,
    SHORT_SIZE_KEYS,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    Computed,
    ConfigPart,
    Derived,
    Key,
    embed_scale_flag,
    score_scalar_key,
)
from hooklens.adapters.keys.positions import FixedPositionKeys, PositionKeys, rotary_dim_keys
from hooklens.adapters.keys.reader import REQUIRED, ConfigReader
from hooklens.adapters.keys.scales import MULTIPLIER_KEYS
from hooklens.adapters.keys.windows import LayeredRotary, WindowKeys, all_but_every, late_layers

__all__ = [
    "INERT_ROUTER_KEYS",
    "MULTIPLIER_KEYS",
    "QK_NORM",
    "REQUIRED",
    "ROOT_EMBED_SCALE",
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
    "LatentKeys",
    "LatentPositionKeys",
    "LayeredRotary",
    "MixtureKeys",
    "PositionKeys",
    "WindowKeys",
    "all_but_every",
    "embed_scale_flag",
    "every_few_layers",
    "gate_scale_key",
    "late_layers",
    "late_mixture_keys",
    "layers_in",
    "norm_key",
    "norm_topk_key",
    "qk_norm_flag",
    "rotary_dim_keys",
    "score_scalar_key",
    "stepped_mixture_keys",
]
