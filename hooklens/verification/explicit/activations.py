"""Activation functions and norms as they are defined."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import Activation, NormConfig


def activate(x: Tensor, act_fn: Activation) -> Tensor:
    """An activation function: GELU is `x` times the normal distribution function, or one of its approximations."""
    if act_fn in ("relu", "relu2"):
        positive = torch.where(x > 0, x, 0.0)
        return positive if act_fn == "relu" else positive**2
    if act_fn == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if act_fn == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    return x / (1 + torch.exp(-(1.702 if act_fn == "gelu_quick" else 1.0) * x))


def denominator(x: Float[Tensor, "*axes size"], norm: NormConfig) -> Float[Tensor, "*axes one"]:
    """The root of the variance (RMS: of the mean square) plus eps."""
    centred = centre(x, norm)
    return ((centred * centred).sum(-1, keepdim=True) / x.shape[-1] + norm.eps) ** 0.5


def centre(x: Float[Tensor, "*axes size"], norm: NormConfig) -> Float[Tensor, "*axes size"]:
    """Less the mean, for LayerNorm; RMSNorm subtracts nothing."""
    return x - x.sum(-1, keepdim=True) / x.shape[-1] if norm.kind == "layer" else x
