"""Activation functions and norms as they are defined."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import Activation, NormConfig


def activate(x: Tensor, act_fn: Activation) -> Tensor:
    """An activation function: GELU is `x` times the normal distribution function, or one of its approximations."""
    return _FUNCTIONS[act_fn](x)


def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


def _share(x: Tensor) -> Tensor:
    exponentials = torch.exp(x - x.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


_FUNCTIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "relu": _positive,
    "relu2": lambda x: _positive(x) ** 2,
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "gelu_quick": lambda x: x * _sigmoid(1.702 * x),
    "silu": lambda x: x * _sigmoid(x),
    "solu": lambda x: x * _share(x),
    "solu_ln": lambda x: x * _share(x),
    "identity": lambda x: x,
    "tanh": lambda x: 2 * _sigmoid(2 * x) - 1,
    "sigmoid": _sigmoid,
}


def xielu(x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
    """Huang and Schlag 2025: a parabola above 0, an exponential below, both on a line of slope 1/2."""
    curve_p, curve_n = torch.log(1 + torch.exp(alpha_p)), 0.5 + torch.log(1 + torch.exp(alpha_n))
    below = torch.exp(torch.minimum(x, x.new_tensor(-1e-6))) - 1 - x
    return torch.where(x > 0, curve_p * x**2, curve_n * below) + x / 2


def clamped_swiglu(gate: Tensor, linear: Tensor, limit: float, alpha: float) -> Tensor:
    """A gated unit with both halves clamped and the linear one moved by 1."""
    gate = torch.where(gate > limit, limit, gate)
    linear = torch.where(linear > limit, limit, torch.where(linear < -limit, -limit, linear))
    return gate / (1 + torch.exp(-alpha * gate)) * (linear + 1)


def denominator(
    x: Float[Tensor, "*axes size"], norm: NormConfig, axes: tuple[int, ...] = (-1,)
) -> Float[Tensor, "*axes one"]:
    """The root of the variance (RMS: of the mean square) plus eps; over several axes the same for all entries of these.

    Args:
        x: what is normed.
        norm: the kind of norm.
        axes: what it goes over, from the end.
    """
    centred = centre(x, norm, axes)
    root = (_mean(centred * centred, axes) + norm.eps) ** 0.5
    return root.expand(*x.shape[:-1], 1)


def centre(
    x: Float[Tensor, "*axes size"], norm: NormConfig, axes: tuple[int, ...] = (-1,)
) -> Float[Tensor, "*axes size"]:
    """Less the mean, for LayerNorm; RMSNorm subtracts nothing."""
    return x - _mean(x, axes) if norm.kind == "layer" else x


def _mean(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return x.sum(axes, keepdim=True) / math.prod(x.shape[axis] for axis in axes)
