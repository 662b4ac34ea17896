"""The MLP, plain or gated."""

import math
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import BlockConfig
from hooklens.hooks import Call, HookPoint, open_call
from hooklens.model.activations import clamp_linear_half, find_activation, xielu
from hooklens.model.norm import Norm, norm
from hooklens.model.parts.declared import When, point, weight
from hooklens.model.parts.part import Part, apply_linear

_GATED = When(lambda block: block.cfg.gated_mlp, "its MLPs are not gated")
_IN_BIASED = When(lambda block: block.has_bias("mlp_in"), "its MLPs have no such bias")
_GATE_BIASED = When(lambda block: block.has_bias("mlp_gate"), "its MLPs have no such bias", _GATED)
_OUT_BIASED = When(lambda block: block.has_bias("mlp_out"), "its MLPs have no such bias")
_NORMED = When(lambda block: block.cfg.act_norm is not None, "its neurons have no norm")
_XIELU = When(lambda block: block.cfg.act_fn == "xielu", "its activation has no weights")
_NEURONS = "batch pos d_mlp"


class MLP(Part, place="blocks.{i}.mlp", kind="mlp"):
    """`act(x W_in + b_in) W_out + b_out`, or gated `(act(x W_gate + b_gate) * (x W_in + b_in)) W_out + b_out`.

    `hook_pre` is what the activation function sees: the gate where there is one. With `act_fn="solu_ln"` the neurons
    are normed (`hook_mid`, `ln`) before they are read.
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
    b_in: Float[Tensor, " d_mlp"] | None = weight("d_mlp", module="in_proj", when=_IN_BIASED)
    b_gate: Float[Tensor, " d_mlp"] | None = weight("d_mlp", module="gate_proj", when=_GATE_BIASED)
    b_out: Float[Tensor, " d_model"] | None = weight("d_model", module="out_proj", writes=True, when=_OUT_BIASED)
    # In a new network the curvature of both sides is 0.8, the published start.
    alpha_p: Float[Tensor, " one"] = weight("one", when=_XIELU, fresh=math.log(math.expm1(0.8)))
    alpha_n: Float[Tensor, " one"] = weight("one", when=_XIELU, fresh=math.log(math.expm1(0.8 - 0.5)))
    hook_pre: HookPoint = point(_NEURONS, "before the activation; gated: the gate")
    hook_pre_linear: HookPoint = point(_NEURONS, "gated MLP: the linear half", when=_GATED)
    hook_mid: HookPoint = point(_NEURONS, "after the activation, before the norm of the neurons", when=_NORMED)
    ln: Norm | None = norm("norm of the neurons", axes=_NEURONS, kind=lambda block: block.cfg.act_norm, when=_NORMED)
    hook_post: HookPoint = point(_NEURONS, "neurons: the input of W_out")

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.gated = self.cfg.gated_mlp
        self.act = find_activation(self.cfg)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], call: Call | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the MLP makes of the normed stream."""
        call = open_call() if call is None else call
        return apply_linear(self._modules["out_proj"], self.hook_post(self._activate(x, call), call), call)

    def _activate(self, x: Float[Tensor, "batch pos d_model"], call: Call) -> Float[Tensor, "batch pos d_mlp"]:
        """The neurons; a function of its own, so that what they are made of is freed before they are read."""
        maps = self._modules
        act = self.act or partial(xielu, alpha_p=self.alpha_p, alpha_n=self.alpha_n)
        if not self.gated:
            neurons = act(self.hook_pre(apply_linear(maps["in_proj"], x, call), call))
            return neurons if self.ln is None else self.ln(self.hook_mid(neurons, call), call)
        gate = act(self.hook_pre(apply_linear(maps["gate_proj"], x, call), call))
        linear = self.hook_pre_linear(apply_linear(maps["in_proj"], x, call), call)
        limit = self.cfg.swiglu_limit
        return gate * (linear if limit is None else clamp_linear_half(linear, limit))

    def make_neurons(self, pre: Tensor, linear: Tensor | None) -> Float[Tensor, "batch pos d_mlp"]:
        """What the activation, and a gated MLP's linear half, make of `hook_pre`; before the norm of neurons.

        As in a forward, which keeps no tensor longer than it needs it, and so does it in steps of its own.
        """
        act = self.act or partial(xielu, alpha_p=self.alpha_p, alpha_n=self.alpha_n)
        if linear is None:
            return act(pre)
        limit = self.cfg.swiglu_limit
        return act(pre) * (linear if limit is None else clamp_linear_half(linear, limit))
