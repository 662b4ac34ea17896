"""The expert that sees every token."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import BlockConfig
from hooklens.hooks import Call, HookPoint
from hooklens.model.moe.spec import EXPERTS_BIASED, SHARED_GATE_BIASED, SHARED_GATED, gating_of
from hooklens.model.parts.declared import point, weight
from hooklens.model.parts.part import Part, apply_linear


class SharedExpert(Part, place="blocks.{i}.mlp.shared"):
    """A gated MLP beside the routed experts; with a gate of its own, its output times `sigmoid(x W_shared_gate)`.

    The sigmoid is taken in the dtype of the activations.
    """

    in_proj: nn.Linear
    gate_proj: nn.Linear
    out_proj: nn.Linear
    shared_gate_proj: nn.Linear
    W_gate: Float[Tensor, "d_model d_shared"] = weight(
        "d_model d_shared", "d_shared d_model", module="gate_proj", reads=True, bias="b_gate"
    )
    W_in: Float[Tensor, "d_model d_shared"] = weight(
        "d_model d_shared", "d_shared d_model", module="in_proj", reads=True, bias="b_in"
    )
    W_out: Float[Tensor, "d_shared d_model"] = weight(
        "d_shared d_model", "d_model d_shared", module="out_proj", writes=True, bias="b_out"
    )
    W_shared_gate: Float[Tensor, "d_model one"] = weight(
        "d_model one", "one d_model", module="shared_gate_proj", reads=True, bias="b_shared_gate", when=SHARED_GATED
    )
    b_gate: Float[Tensor, " d_shared"] | None = weight("d_shared", module="gate_proj", when=EXPERTS_BIASED)
    b_in: Float[Tensor, " d_shared"] | None = weight("d_shared", module="in_proj", when=EXPERTS_BIASED)
    b_out: Float[Tensor, " d_model"] | None = weight("d_model", module="out_proj", writes=True, when=EXPERTS_BIASED)
    b_shared_gate: Float[Tensor, " one"] | None = weight("one", module="shared_gate_proj", when=SHARED_GATE_BIASED)
    hook_pre: HookPoint = point("batch pos d_shared", "shared expert: gates of its neurons, before the activation")
    hook_pre_linear: HookPoint = point("batch pos d_shared", "shared expert: the linear half of its neurons")
    hook_post: HookPoint = point("batch pos d_shared", "shared expert: its neurons, the input of its W_out")
    hook_gate: HookPoint = point(
        "batch pos one", "shared expert: what its output is multiplied by, after the sigmoid", when=SHARED_GATED
    )
    hook_out: HookPoint = point("batch pos d_model", "what the shared expert adds")

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.make_neurons = gating_of(block)
        self.is_gated = SHARED_GATED.holds(block)

    def forward(self, x: Float[Tensor, "batch pos d_model"], call: Call) -> Float[Tensor, "batch pos d_model"]:
        """What the shared expert adds."""
        maps = self._modules
        gate = self.hook_pre(apply_linear(maps["gate_proj"], x, call), call)
        linear = self.hook_pre_linear(apply_linear(maps["in_proj"], x, call), call)
        out = apply_linear(maps["out_proj"], self.hook_post(self.make_neurons(gate, linear), call), call)
        if self.is_gated:
            out = self.hook_gate(torch.sigmoid(apply_linear(maps["shared_gate_proj"], x, call)), call) * out
        return self.hook_out(out, call)
