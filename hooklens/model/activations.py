"""Activation functions by name, and their definitions.

    relu2(x)       = relu(x)^2                                          (So et al. 2021)
    gelu_quick(x)  = x sigmoid(1.702 x)
    solu(x)        = x softmax(x), over the neurons of one position     (Elhage et al. 2022)
    xielu(x)       = a_p x^2 + x/2                            x > 0
                     a_n (expm1(min(x, -1e-6)) - x) + x/2     else      (Huang and Schlag 2025)
                     with a_p = softplus(alpha_p), a_n = 1/2 + softplus(alpha_n), learned in each layer

`solu_ln` is `solu` with a norm over the neurons behind it. In a gated MLP the activation is that of the gate, times the
linear half, but for the clamped SwiGLU (OpenAI 2025, the open-weight models):

    clamped_swiglu(g, x) = g' sigmoid(alpha g') (x' + 1),  g' = min(g, limit), x' = x cut to [-limit, limit]
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hooklens.config import Activation, HookedConfig


def _gelu_quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _solu(x: Tensor) -> Tensor:
    return x * x.softmax(-1)


def _identity(x: Tensor) -> Tensor:
    # As the others give: what is edited in place behind it is not what went in.
    return x.clone()


def clamped_swish(x: Float[Tensor, "*axes"], *, limit: float, alpha: float) -> Float[Tensor, "*axes"]:
    """The gate of a clamped SwiGLU."""
    clamped = x.clamp(max=limit)
    return clamped * torch.sigmoid(alpha * clamped)


def xielu(x: Float[Tensor, "*axes"], alpha_p: Float[Tensor, " one"], alpha_n: Float[Tensor, " one"]) -> Tensor:
    """The xIELU with its two learned numbers, before their softplus."""
    positive = F.softplus(alpha_p) * x * x
    # The cut keeps the unused branch's gradient finite.
    negative = (0.5 + F.softplus(alpha_n)) * (torch.expm1(x.clamp(max=-1e-6)) - x)
    return torch.where(x > 0, positive, negative) + 0.5 * x


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": _relu_squared,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_quick": _gelu_quick,
    "silu": F.silu,
    "solu": _solu,
    "solu_ln": _solu,
    "identity": _identity,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
"""Those that are functions of their input alone."""


def find_activation(cfg: HookedConfig) -> Callable[[Tensor], Tensor] | None:
    """The activation of a network's MLPs; of a clamped SwiGLU that of the gate. None for one with weights, `xielu`."""
    if cfg.act_fn == "clamped_swiglu":
        assert cfg.swiglu_limit is not None
        assert cfg.swiglu_alpha is not None
        return partial(clamped_swish, limit=cfg.swiglu_limit, alpha=cfg.swiglu_alpha)
    return ACTIVATIONS.get(cfg.act_fn)


def clamp_linear_half(linear: Float[Tensor, "*axes d_mlp"], limit: float) -> Float[Tensor, "*axes d_mlp"]:
    """What multiplies the gate in a clamped SwiGLU."""
    return linear.clamp(-limit, limit) + 1
