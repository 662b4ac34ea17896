"""The mixture of experts at the MLP's place."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hooklens.config import BlockConfig
from hooklens.hooks import Call, HookPoint, open_call
from hooklens.model.moe.experts import ExpertMaps, Experts
from hooklens.model.moe.router import Router
from hooklens.model.moe.shared import SharedExpert
from hooklens.model.moe.spec import CHOICE_BIASED, EXPERTS_BIASED, ROUTER_BIASED, SHARES, mixture_of
from hooklens.model.parts.declared import When, inner, point, weight
from hooklens.model.parts.part import Part, apply_linear
from hooklens.precision import widen

_ELSEWHERE = When(
    lambda block: False,
    "a mixture of experts stands in the MLP's place; the neurons of a token's experts are at mlp.experts, next to "
    "mlp.router.hook_choice, which says whose they are",
)


class MoE(Part, place="blocks.{i}.mlp", kind="moe"):
    """`sum over chosen e of g_e * expert_e(x)`, plus a shared expert where there is one; see `MoEConfig`.

        x ---+-- W_router -- router: logits, choice, weights (the gates g)
             |                          |
             +------------- experts: pre, pre_linear, post, result --- (+) --- what the layer adds
             |                                                         |
             +------------- shared: pre, pre_linear, post, gate -------+

    The weights of the experts are stacked, `W_in[e]` is expert e's. They are plain parameters in the logical shape, not
    `nn.Linear`s: torch has no module for so many maps at once.
    """

    router_proj: nn.Linear
    W_router: Float[Tensor, "d_model expert"] = weight(
        "d_model expert", "expert d_model", module="router_proj", reads=True, bias="b_router"
    )
    b_router: Float[Tensor, " expert"] | None = weight("expert", module="router_proj", when=ROUTER_BIASED)
    b_choice: Float[Tensor, " expert"] = weight("expert", when=CHOICE_BIASED)
    router: Router = inner(Router)
    W_gate: Float[Tensor, "expert d_model d_expert"] = weight("expert d_model d_expert", reads=True, bias="b_gate")
    W_in: Float[Tensor, "expert d_model d_expert"] = weight("expert d_model d_expert", reads=True, bias="b_in")
    W_out: Float[Tensor, "expert d_expert d_model"] = weight("expert d_expert d_model", writes=True, bias="b_out")
    b_gate: Float[Tensor, "expert d_expert"] | None = weight("expert d_expert", when=EXPERTS_BIASED)
    b_in: Float[Tensor, "expert d_expert"] | None = weight("expert d_expert", when=EXPERTS_BIASED)
    b_out: Float[Tensor, "expert d_model"] | None = weight("expert d_model", writes=True, when=EXPERTS_BIASED)
    experts: Experts = inner(Experts)
    shared: SharedExpert | None = inner(SharedExpert, reads_outer=True, when=SHARES)
    hook_pre: HookPoint = point("batch pos d_mlp", "before the activation; gated: the gate", when=_ELSEWHERE)
    hook_pre_linear: HookPoint = point("batch pos d_mlp", "gated MLP: the linear half", when=_ELSEWHERE)
    hook_post: HookPoint = point("batch pos d_mlp", "neurons: the input of W_out", when=_ELSEWHERE)

    def __init__(self, block: BlockConfig) -> None:
        super().__init__(block)
        self.routes_in_float32 = mixture_of(block).router_float32
        for name in {"b_choice", "b_gate", "b_in", "b_out"} & set(self.absent):
            self.register_parameter(name, None)

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], call: Call | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the experts make of the normed stream."""
        call = open_call() if call is None else call
        held = self._parameters
        routing = self.router(self._score(x), held["b_choice"], x.dtype, call)
        maps = ExpertMaps(
            self.W_gate, self.W_in, self.W_out, b_gate=held["b_gate"], b_in=held["b_in"], b_out=held["b_out"]
        )
        out: Tensor = self.experts(x, routing, maps, call)
        return out if self.shared is None else out + self.shared(x, call)

    def _score(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
        """The router's logits."""
        linear = self._modules["router_proj"]
        if not self.routes_in_float32 or widen(x) is x:
            return apply_linear(linear, x)
        assert isinstance(linear, nn.Linear)
        bias = linear.bias
        return F.linear(widen(x), widen(linear.weight), None if bias is None else widen(bias))
