"""The MLP, plain or gated."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import Activation, BlockConfig
from hooklens.hooks import Call, HookPoint, open_call
from hooklens.model.declared import When, point, weight
from hooklens.model.part import Part, apply_linear


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


_GATED = When(lambda block: block.cfg.gated_mlp, "its MLPs are not gated")
_BIASED = When(lambda block: block.cfg.mlp_bias, "its MLPs have no biases")
_GATE_BIASED = When(lambda block: block.cfg.gated_mlp and block.cfg.mlp_bias, "its MLPs have no such bias")


class MLP(Part, place="blocks.{i}.mlp", kind="mlp"):
    """`act(x W_in + b_in) W_out + b_out`, or gated `(act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out`.

    `hook_pre` is what the activation function sees: the gate where there is one.
    """

    in_proj: nn.Linear
    gate_proj: nn.Linear
    out_proj: nn.Linear
    W_in: Float[Tensor, "d_model d_mlp"] = weight(
        "d_model d_mlp", "d_mlp d_model", module="in_proj", reads=True, bias="b_in"
    )
    W_gate: Float[Tensor, "d_model d_mlp"] = weight(
        "d_model d_mlp", "d_mlp d_model", module="gate_proj", reads=True, bias="b_gate", when=_GATED
    )
    W_out: Float[Tensor, "d_mlp d_model"] = weight(
        "d_mlp d_model", "d_model d_mlp", module="out_proj", writes=True, bias="b_out"
    )
    b_in: Float[Tensor, " d_mlp"] | None = weight("d_mlp", module="in_proj", when=_BIASED)
    b_gate: Float[Tensor, " d_mlp"] | None = weight("d_mlp", module="gate_proj", when=_GATE_BIASED)
    b_out: Float[Tensor, " d_model"] | None = weight("d_model", module="out_proj", writes=True, when=_BIASED)
    hook_pre: HookPoint = point("batch pos d_mlp", "before the activation; gated: the gate")
    hook_pre_linear: HookPoint = point("batch pos d_mlp", "gated MLP: the linear half", when=_GATED)
    hook_post: HookPoint = point("batch pos d_mlp", "neurons: the input of W_out")

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.gated = self.cfg.gated_mlp
        self.act = ACTIVATIONS[self.cfg.act_fn]

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], call: Call | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP makes of the normed stream."""
        call = open_call() if call is None else call
        return apply_linear(self._modules["out_proj"], self.hook_post(self._activate(x, call), call))

    def _activate(self, x: Float[Tensor, "batch pos d_model"], call: Call) -> Float[Tensor, "batch pos d_mlp"]:
        """The neurons; a function of its own, so that what they are made of is freed before they are read."""
        maps = self._modules
        if not self.gated:
            return self.act(self.hook_pre(apply_linear(maps["in_proj"], x), call))
        gate = self.act(self.hook_pre(apply_linear(maps["gate_proj"], x), call))
        return gate * self.hook_pre_linear(apply_linear(maps["in_proj"], x), call)
