"""What `run_with_cache` refuses for want of memory, and what it does not look at."""

import pytest
import torch

import hooklens as hl
from hooklens.causal_lm.memory import guard
from hooklens.errors import HookLensError, InsufficientMemoryError

TOKENS = torch.full((2, 64), 5)


@pytest.fixture(scope="module")
def model() -> hl.HookedCausalLM:
    return hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> int:
    """Two megabytes are free, and no call is small."""
    free = 2_000_000
    monkeypatch.setattr(guard, "_SMALL", 0)
    monkeypatch.setattr(guard, "free_bytes", lambda device: free)
    monkeypatch.setattr("hooklens.causal_lm.memory.plan.free_bytes", lambda device: free)
    return free


def test_what_does_not_fit_is_refused_before_it_runs(model, little: int) -> None:
    ran: list[str] = []
    watch = [("hook_embed", lambda tensor, hook: ran.append(hook.name))]
    with torch.no_grad():
        planned = hl.plan(model, TOKENS)
        with pytest.raises(InsufficientMemoryError) as refused:
            model.run_with_cache(TOKENS, fwd_hooks=watch)
    assert ran == []
    assert planned.peak > little
    text = str(refused.value)
    assert f"would take {planned.peak / 1e9:.2f} GB on cpu, where {little / 1e9:.2f} GB are free" in text
    assert "one row at a time" in text or "batches of" in text
    assert "check_memory=False runs the call as it is" in text
    assert isinstance(refused.value, MemoryError)
    assert isinstance(refused.value, HookLensError)


def test_what_fits_runs(model, little: int) -> None:
    with torch.no_grad():
        assert hl.plan(model, TOKENS, names_filter="resid_post").peak < little
        _, cache = model.run_with_cache(TOKENS, names_filter="resid_post")
        assert len(cache) == 4
        assert len(model.run_with_cache(TOKENS, check_memory=False)[1]) > 50


def test_what_cannot_be_planned_runs(model, little: int) -> None:
    """An edit that looks at values has no plan, which is no reason to refuse the call."""

    def branch(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2 if tensor.sum() > 0 else tensor

    assert len(model.run_with_cache(TOKENS, edits=[hl.edits.Custom("z", branch)])[1]) > 50


def test_small_calls_are_not_looked_at(model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the free memory is asked for nor a plan made where the bound is small; above it both are."""
    asked: list[object] = []
    monkeypatch.setattr(guard, "free_bytes", asked.append)
    model.run_with_cache(TOKENS)
    assert asked == []
    monkeypatch.setattr(guard, "_SMALL", 0)
    model.run_with_cache(TOKENS)
    assert asked == [torch.device("cpu")]


@pytest.mark.parametrize("names", [None, "*", ["pattern", "resid_post"]])
def test_the_bound_is_one(model, names: object) -> None:
    """No plan of a call keeps more than the bound that decides whether it is made."""
    call = model._prepare(TOKENS)
    points = model.select_hook_points(names)
    assert guard._bound(model, call, len(points)) >= hl.plan(model, TOKENS, names_filter=names, grad=False).captured
