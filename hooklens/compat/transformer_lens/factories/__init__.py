"""Activations and MLPs chosen by a config."""

import sys
from typing import Any

from hooklens.compat.transformer_lens.components import MLP, GatedMLP, MoE, _mlps
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig


class ActivationFunctionFactory:
    """Chooses an activation."""

    pick_activation_function = staticmethod(_mlps.pick_activation)


class MLPFactory:
    """Makes what stands at the MLP's place."""

    @staticmethod
    def create_mlp(cfg: HookedTransformerConfig) -> Any:
        """The part of a config."""
        return (MoE if cfg.num_experts else GatedMLP if cfg.gated_mlp else MLP)(cfg)


for _name in ("activation_function_factory", "mlp_factory"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]
