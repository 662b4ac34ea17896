"""MLPs of TransformerLens 2.x."""

from abc import ABCMeta
from typing import Any, ClassVar

from torch import nn

from hooklens.compat.transformer_lens.components import _parts
from hooklens.compat.transformer_lens.hook_points import HookPoint
from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.compat.transformer_lens.utilities import SUPPORTED_ACTIVATIONS, XIELU
from hooklens.model import mlp
from hooklens.model.moe import mixture


class CanBeUsedAsMLP(nn.Module, metaclass=ABCMeta):
    """The base of MLPs of one's own; those of models count as such, too."""

    act_fn: Any
    hook_mid: HookPoint
    ln: _parts.AnyNorm

    def __init__(self, cfg: _parts.Config) -> None:
        super().__init__()
        self.cfg = HookedTransformerConfig.unwrap(cfg)
        if self.cfg.d_mlp is None:
            raise ValueError("d_mlp must be set to use an MLP")
        self.d_mlp = self.cfg.d_mlp

    def select_activation_function(self) -> None:
        """Set `act_fn`, and where a norm stands behind it `hook_mid` and `ln`."""
        self.act_fn = pick_activation(self.cfg)
        if self.cfg.is_layer_norm_activation():
            self.hook_mid = HookPoint()
            has_weight = self.cfg.normalization_type == "LN"
            self.ln = _parts.LayerNorm(self.cfg, self.d_mlp) if has_weight else _parts.LayerNormPre(self.cfg)


def pick_activation(cfg: HookedTransformerConfig) -> Any:
    """The activation of a config."""
    if cfg.act_fn is None:
        raise ValueError("act_fn not set when trying to select Activation Function")
    if cfg.act_fn not in SUPPORTED_ACTIVATIONS:
        raise ValueError(f"Invalid activation function name: {cfg.act_fn}")
    return XIELU() if cfg.act_fn == "xielu" else SUPPORTED_ACTIVATIONS[cfg.act_fn]


class _MLP(_parts.Component):
    """What MLPs have in common."""

    d_mlp = property(lambda self: self.cfg.d_mlp, doc="Neurons.")
    act_fn = property(lambda self: self.act, doc="The activation.")

    def __init__(self, cfg: _parts.Config) -> None:
        CanBeUsedAsMLP(cfg)
        own = _parts.network_of(cfg, attn_only=False, **self.changes).block(0)
        assert own.mlp is not None
        super(_parts.Component, self).__init__(own.of(own.mlp))
        self.start(cfg)


@CanBeUsedAsMLP.register
class MLP(_MLP, mlp.MLP):
    """MLP without gate."""

    b_in, b_out = map(_parts.bias_or_zeros, ("b_in", "b_out"))
    changes: ClassVar[dict[str, Any]] = {"gated_mlp": False, "num_experts": None}


@CanBeUsedAsMLP.register
class GatedMLP(_MLP, mlp.MLP):
    """MLP with a gate, whose `b_in` is 0."""

    b_in, b_out = MLP.b_in, MLP.b_out
    changes: ClassVar[dict[str, Any]] = {"gated_mlp": True, "num_experts": None}


@CanBeUsedAsMLP.register
class MoE(_MLP, mixture.MoE):
    """Mixture of experts."""

    def __init__(self, cfg: _parts.Config) -> None:
        words = HookedTransformerConfig.unwrap(cfg)
        assert words.num_experts is not None, "num_experts must be specified for MoE layer"
        super().__init__(words)


_parts.CLASSES.update({mlp.MLP: (MLP, GatedMLP), mixture.MoE: MoE})
