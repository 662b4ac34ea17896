"""Hard concrete gates: random numbers in [0, 1] that are exactly 0 or 1 often enough, and differentiable.

A gate with parameter `log_alpha` is, for `u` uniform on (0, 1) (Louizos et al. 2018, "Learning Sparse Neural Networks
through L0 Regularization"),

    s = sigmoid((log u - log(1 - u) + log_alpha) / temperature)
    z = clip(s (high - low) + low, 0, 1)

with `temperature` 2/3, `low` -0.1 and `high` 1.1, theirs. It is open, `z > 0`, with probability
`sigmoid(log_alpha - temperature log(-low / high))`, so the expected number of open gates has a gradient.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1
_OFFSET = TEMPERATURE * math.log(-LOW / HIGH)


def sample_gates(log_alpha: Float[Tensor, " gate"], generator: torch.Generator) -> Float[Tensor, " gate"]:
    """Gates drawn at random, each on its own."""
    drawn = torch.rand(log_alpha.shape, generator=generator, dtype=torch.float64).to(log_alpha)
    smallest = torch.finfo(log_alpha.dtype).eps
    u = drawn.clamp(smallest, 1 - smallest)
    s = torch.sigmoid((u.log() - (-u).log1p() + log_alpha) / TEMPERATURE)
    return (s * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """How likely gates are not exactly 0."""
    return torch.sigmoid(log_alpha - _OFFSET)


def log_alpha_of(probability: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The parameter of gates that are open with these probabilities."""
    return torch.logit(probability) + _OFFSET
