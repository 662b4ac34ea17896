"""Short hashes of what decides a score: the model with its weights, and the prefix."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM

_SAMPLED = 64


def model_fingerprint(model: HookedCausalLM) -> str:
    """A hash of configuration, dtype, weight processing, and 64 entries of every weight.

    Training moves (nearly) every entry, so a sample tells two checkpoints of one architecture apart, at no
    cost for large models.
    """
    parts = hashlib.sha256()
    parts.update(f"{model.cfg.fingerprint} {model.dtype} {model.transforms}".encode())
    for name, parameter in model.named_parameters():
        parts.update(f"{name} {[str(entry) for entry in sample_entries(parameter)]}".encode())
    return parts.hexdigest()[:16]


@torch.no_grad()
def sample_entries(tensor: Tensor) -> list[float]:
    """Up to 64 entries, evenly spread; the tensor is not copied."""
    positions = torch.linspace(0, tensor.numel() - 1, min(_SAMPLED, tensor.numel()), dtype=torch.float64).long()
    index = torch.unravel_index(positions.to(tensor.device), tensor.shape)
    sampled: list[float] = tensor[index].double().tolist()
    return sampled


def token_fingerprint(tokens: Sequence[int]) -> str:
    """A hash of token ids."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()[:16]
