"""What the parts of a mixture ask of their layer's description."""

from collections.abc import Callable

from torch import Tensor

from hooklens.config import BlockConfig, MoEConfig
from hooklens.model.activations import ACTIVATIONS, clamp_linear_half, clamped_swish
from hooklens.model.parts.declared import When


def mixture_of(block: BlockConfig) -> MoEConfig:
    """The description of a layer's mixture."""
    mixture = block.mlp
    assert isinstance(mixture, MoEConfig)
    return mixture


ROUTER_BIASED = When(lambda block: mixture_of(block).router_bias, "its routers have no biases")
EXPERTS_BIASED = When(lambda block: mixture_of(block).expert_bias, "its experts have no biases")
CHOICE_BIASED = When(lambda block: mixture_of(block).choice_bias, "its routers choose by the scores alone")
SHARES = When(lambda block: mixture_of(block).d_shared is not None, "it has no shared expert")
SHARED_GATED = When(lambda block: mixture_of(block).shared_gate, "its shared expert has no gate", SHARES)
SHARED_GATE_BIASED = When(lambda block: True, "", SHARED_GATED, ROUTER_BIASED)

Gating = Callable[[Tensor, Tensor], Tensor]


def gating_of(block: BlockConfig) -> Gating:
    """How a layer's experts make neurons of their gate and their linear half."""
    mixture = mixture_of(block)
    name = block.cfg.act_fn if mixture.act_fn is None else mixture.act_fn
    if name == "clamped_swiglu":
        limit, alpha = mixture.limit_and_alpha
        return lambda gate, linear: clamped_swish(gate, limit=limit, alpha=alpha) * clamp_linear_half(linear, limit)
    act = ACTIVATIONS[name]
    return lambda gate, linear: act(gate) * linear
