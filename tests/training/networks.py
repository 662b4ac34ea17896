"""Small networks to train, and what is compared of them."""

import torch
from torch import nn

from hooklens import HookedCausalLM, HookedConfig, LearnedPositions, RotaryPositions

D_VOCAB = 24


def make_model(**changes) -> HookedCausalLM:
    """A float32 model of two layers that reads ids."""
    fields = {
        "d_model": 16,
        "n_layers": 2,
        "n_heads": 2,
        "d_vocab": D_VOCAB,
        "n_ctx": 16,
        "positions": LearnedPositions(),
        "init_std": 0.2,
    }
    model = HookedCausalLM(HookedConfig(**{**fields, **changes}))
    model.initialize(seed=0)
    return model


def make_rotary_model(**changes) -> HookedCausalLM:
    return make_model(positions=RotaryPositions(dim=4), **changes)


def make_classifier() -> nn.Module:
    """A network that draws random numbers and keeps running statistics."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))


def classify(model: nn.Module, batch) -> torch.Tensor:
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


def make_rows(n=24, length=8, seed=5) -> torch.Tensor:
    return torch.randint(0, D_VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def copy_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal_states(one, other) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
