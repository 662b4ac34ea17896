"""The MLP, plain or gated."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import Activation, HookedConfig
from hooklens.hooks import HookPoint
from hooklens.model.stored import StoredWeights
from hooklens.weights.layout import empty_weight


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": _relu_squared,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_quick": _gelu_quick,
    "silu": F.silu,
}


class MLP(StoredWeights):
    """`act(x W_in + b_in) W_out + b_out`, or gated `(act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out`.

    `hook_pre` is what the activation function sees: the gate where there is one.
    """

    def __init__(self, cfg: HookedConfig) -> None:
        super().__init__()
        self.gated = cfg.gated_mlp
        gate = ("W_gate", "b_gate") if self.gated else ()
        self._view_names = ("W_in", "b_in", "W_out", "b_out", *gate)
        self.act = ACTIVATIONS[cfg.act_fn]

        def weight(name: str, *shape: int) -> nn.Parameter:
            return nn.Parameter(empty_weight(name, shape))

        def bias(name: str, size: int) -> nn.Parameter | None:
            return weight(name, size) if cfg.mlp_bias else None

        self.W_in = weight("W_in", cfg.d_model, cfg.d_mlp)
        self.b_in = bias("b_in", cfg.d_mlp)
        self.W_out = weight("W_out", cfg.d_mlp, cfg.d_model)
        self.b_out = bias("b_out", cfg.d_model)
        self.hook_pre = HookPoint()
        if self.gated:
            self.W_gate = weight("W_gate", cfg.d_model, cfg.d_mlp)
            self.b_gate = bias("b_gate", cfg.d_mlp)
            self.hook_pre_linear = HookPoint()
        self.hook_post = HookPoint()

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP makes of the normed stream."""
        W_in, b_in, W_out, b_out, *gate = self.stored_weights()
        return F.linear(self.hook_post(self._activate(x, W_in, b_in, *gate)), W_out, b_out)

    def _activate(
        self,
        x: Float[Tensor, "batch pos d_model"],
        W_in: Float[Tensor, "d_mlp d_model"],
        b_in: Float[Tensor, " d_mlp"] | None,
        W_gate: Float[Tensor, "d_mlp d_model"] | None = None,
        b_gate: Float[Tensor, " d_mlp"] | None = None,
    ) -> Float[Tensor, "batch pos d_mlp"]:
        """The neurons; a function of its own, so that what they are made of is freed before they are read."""
        if W_gate is None:
            return self.act(self.hook_pre(F.linear(x, W_in, b_in)))
        pre = self.hook_pre(F.linear(x, W_gate, b_gate))
        pre_linear = self.hook_pre_linear(F.linear(x, W_in, b_in))
        return self.act(pre) * pre_linear
