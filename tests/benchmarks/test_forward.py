"""Forward and `run_with_cache` against the transformers model with `sdpa`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.models import FAMILIES, build_pair


def _calls(reference: Any, model: Any, tokens: torch.Tensor) -> dict[str, Callable[[], object]]:
    return {
        "transformers": lambda: reference(tokens, use_cache=False),
        "plain": lambda: model(tokens),
        "everything": lambda: model.run_with_cache(tokens),
        "resid_post": lambda: model.run_with_cache(tokens, names_filter="resid_post"),
        "pattern": lambda: model.run_with_cache(tokens, names_filter="pattern"),
    }


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_overhead_bound(family: str, benchmark: Any, record: Any, one_thread: None, device: str) -> None:
    """6 layers, d_model 128, batch 1 x 16, one thread."""
    reference, model = build_pair(family, n_layers=6, d_model=128, n_heads=4, device=device)
    tokens = torch.randint(0, 1000, (1, 16), device=device)
    seconds = time_alternating(_calls(reference, model, tokens), rounds=300)
    subject = f"overhead-bound, {family}, {device}:"
    record(f"{subject} plain / transformers", seconds["plain"] / seconds["transformers"], at_most=0.75)
    record(f"{subject} caching everything / transformers", seconds["everything"] / seconds["transformers"], at_most=1.0)
    record(f"{subject} caching everything / plain", seconds["everything"] / seconds["plain"])
    record(f"{subject} caching resid_post / plain", seconds["resid_post"] / seconds["plain"], at_most=1.02)
    benchmark.extra_info.update({f"ms {name}": value * 1e3 for name, value in seconds.items()})
    benchmark.pedantic(lambda: model(tokens), rounds=20)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compute_bound(family: str, benchmark: Any, record: Any, device: str) -> None:
    """12 layers, d_model 768, batch 1 x 1024."""
    reference, model = build_pair(family, n_layers=12, d_model=768, n_heads=12, device=device)
    tokens = torch.randint(0, 1000, (1, 1024), device=device)
    seconds = time_alternating(_calls(reference, model, tokens), rounds=12, warm_up=1)
    subject = f"compute-bound, {family}, {device}:"
    record(f"{subject} plain / transformers", seconds["plain"] / seconds["transformers"], at_most=1.0)
    record(f"{subject} caching resid_post / plain", seconds["resid_post"] / seconds["plain"])
    record(f"{subject} caching everything / plain", seconds["everything"] / seconds["plain"])
    benchmark.extra_info.update({f"ms {name}": value * 1e3 for name, value in seconds.items()})
    benchmark.pedantic(lambda: model(tokens), rounds=2)


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compute_bound_in_bfloat16(family: str, benchmark: Any, record: Any) -> None:
    """The same on an accelerator, in bfloat16."""
    reference, model = build_pair(family, n_layers=12, d_model=768, n_heads=12, device="cuda", dtype=torch.bfloat16)
    tokens = torch.randint(0, 1000, (1, 1024), device="cuda")
    seconds = time_alternating(_calls(reference, model, tokens), rounds=50)
    record(
        f"compute-bound, {family}, cuda bfloat16: plain / transformers",
        seconds["plain"] / seconds["transformers"],
        at_most=1.02,
    )
    benchmark.pedantic(lambda: model(tokens), rounds=10)
