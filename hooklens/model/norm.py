"""LayerNorm and RMSNorm with hook points on the denominator and on what it divides."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import NormConfig
from hooklens.hooks import HookedModule, HookPoint
from hooklens.precision import widen
from hooklens.weights.layout import empty_weight


class Norm(HookedModule):
    """A norm over the last axis: `(x - mean) / scale * w + b`, or `x / scale * w` for the RMS kind.

    The fused kernel does the work. With a listener the scale and the normalized tensor are computed
    beside it, in float32 for half-precision inputs, and the output is recomputed from them only when a
    listener changed one. `hook_scale` carries float32 for half-precision inputs.
    """

    def __init__(self, cfg: NormConfig, size: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.size = (size,)
        self.w = nn.Parameter(empty_weight("w", [size]))
        self.b = nn.Parameter(empty_weight("b", [size])) if cfg.bias else None
        self.hook_scale = HookPoint()
        self.hook_normalized = HookPoint()

    def initialize(self) -> None:
        """Make the norm's weight act as 1 and its bias as 0."""
        nn.init.constant_(self.w, 0.0 if self.cfg.unit_offset else 1.0)
        if self.b is not None:
            nn.init.zeros_(self.b)

    @property
    def listening(self) -> bool:
        """Whether somebody listens inside the norm."""
        return self.hook_scale.listening or self.hook_normalized.listening

    def forward(self, x: Float[Tensor, "*axes size"]) -> Float[Tensor, "*axes size"]:
        """Normalize, showing listeners what they asked for."""
        if not (self.hook_scale.listening or self.hook_normalized.listening):
            return self.apply_weights(x)
        return self._forward_watched(x)

    def apply_weights(self, x: Float[Tensor, "*axes size"]) -> Float[Tensor, "*axes size"]:
        """The norm as a plain function; hook points do not fire."""
        if self.cfg.kind == "layer":
            return F.layer_norm(x, self.size, self._gain(), self.b, self.cfg.eps)
        return F.rms_norm(x, self.size, self._gain(), self.cfg.eps)

    def _gain(self) -> Tensor:
        return 1.0 + self.w if self.cfg.unit_offset else self.w

    def _forward_watched(self, x: Tensor) -> Tensor:
        centred, scale = self._centre_and_scale(x)
        changed = False
        if self.hook_scale.listening:
            scale, changed = self.hook_scale.watch(scale)
        normalized = (centred / scale).to(x.dtype)
        if self.hook_normalized.listening:
            normalized, normalized_changed = self.hook_normalized.watch(normalized)
            changed = changed or normalized_changed
        if not changed:
            return self.apply_weights(x)
        out = normalized * self._gain()
        return out if self.b is None else out + self.b

    def _centre_and_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = widen(x)
        if self.cfg.kind == "rms":
            return wide, (wide.pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt()
        if wide is x and not (torch.is_grad_enabled() and x.requires_grad):
            # The kernel gives its statistics away, though without gradients; the reductions cost far more.
            _, mean, inverse_scale = torch.native_layer_norm(x, self.size, None, None, self.cfg.eps)
            return x - mean, inverse_scale.reciprocal()
        centred = wide - wide.mean(-1, keepdim=True)
        return centred, (centred.pow(2).mean(-1, keepdim=True) + self.cfg.eps).sqrt()
