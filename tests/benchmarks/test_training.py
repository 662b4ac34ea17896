"""A training step against the same transformers model's, as it is and compiled."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.models import FAMILIES, build_pair


def _make_step(forward: Callable[[], torch.Tensor], parameters: Any) -> Callable[[], None]:
    """Forward, backward, clipping and AdamW, as `hooklens.training.train` puts them after each other."""
    trained = list(parameters)
    # The kernel that `Trainer` takes by default.
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step() -> None:
        forward().backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _time(family: str, device: str, shape: tuple[int, int], *, compiled: bool, rounds: int) -> dict[str, float]:
    reference, model = build_pair(family, n_layers=4, d_model=128, n_heads=4, device=device)
    # One family's weights are shared otherwise, and both would train them.
    model = type(model).from_hf(reference, share=False)
    reference.train()
    model.train()
    tokens = torch.randint(0, 1000, shape, device=device)
    theirs: Any = torch.compile(reference) if compiled else reference
    ours: Any = torch.compile(model) if compiled else model
    steps = {
        "transformers": _make_step(lambda: theirs(tokens, labels=tokens, use_cache=False).loss, reference.parameters()),
        "hooklens": _make_step(lambda: ours(tokens, return_type="loss"), model.parameters()),
    }
    return time_alternating(steps, rounds=rounds)


@pytest.mark.parametrize("shape", [(1, 16), (8, 128)], ids=["overhead", "compute"])
@pytest.mark.parametrize("family", FAMILIES)
def test_step(family: str, shape: tuple[int, int], benchmark: Any, record: Any, one_thread: None, device: str) -> None:
    """4 layers, d_model 128, one thread."""
    seconds = _time(family, device, shape, compiled=False, rounds=60 if shape[0] == 1 else 12)
    subject = f"training step, {family}, batch {shape[0]} x {shape[1]}, {device}:"
    record(f"{subject} / transformers", seconds["hooklens"] / seconds["transformers"], at_most=0.95)
    benchmark.extra_info.update({f"ms {name}": value * 1e3 for name, value in seconds.items()})
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_step(family: str, benchmark: Any, record: Any, one_thread: None, device: str) -> None:
    """The same, both compiled."""
    seconds = _time(family, device, (8, 128), compiled=True, rounds=12)
    subject = f"training step, {family}, batch 8 x 128, compiled, {device}:"
    record(f"{subject} / transformers compiled", seconds["hooklens"] / seconds["transformers"], at_most=1.0)
    benchmark.extra_info.update({f"ms {name}": value * 1e3 for name, value in seconds.items()})
    benchmark.pedantic(lambda: None, rounds=1)
