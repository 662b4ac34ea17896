"""Many suffixes behind one prefix: a reused frozen cache, a transformers cache copied and repeated, full sequences."""

import copy
from typing import Any

import pytest
import torch

from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.models import build_pair
from tests.benchmarks.peak import PeakMemory

_N_PREFIX = 1024
_SIZES = {"n_layers": 12, "d_model": 768, "n_heads": 12}


@torch.no_grad()
@pytest.mark.parametrize(("n_rows", "n_new", "bar"), [(32, 8, 4.5), (64, 4, 8.0)])
def test_suffixes_on_a_reused_prefix(n_rows: int, n_new: int, bar: float, device: str, record: Any) -> None:
    """transformers keeps what it appends, so its cache is copied and repeated for each use."""
    reference, model = build_pair("gpt_neox", **_SIZES, device=device)
    prefix = torch.randint(0, 1000, (1, _N_PREFIX), device=device)
    suffixes = torch.randint(0, 1000, (n_rows, n_new), device=device)
    kv = model.prefill(prefix)
    past = reference(prefix, use_cache=True, logits_to_keep=1).past_key_values

    def run_on_frozen() -> torch.Tensor:
        return model(suffixes, past_kv_cache=kv)

    def run_on_copy() -> torch.Tensor:
        repeated = copy.deepcopy(past)
        repeated.batch_repeat_interleave(n_rows)
        return reference(suffixes, past_key_values=repeated, use_cache=True).logits

    # Both compute the same: no figure without equal results.
    torch.testing.assert_close(run_on_frozen(), run_on_copy(), rtol=1e-3, atol=1e-3)
    seconds = time_alternating({"frozen": run_on_frozen, "copy": run_on_copy}, rounds=5, warm_up=1)
    what = f"{n_rows} suffixes of {n_new} on {_N_PREFIX}, {device}"
    record(f"{what}: times faster than a copied cache", seconds["copy"] / seconds["frozen"], at_least=bar)
    record(
        f"{what}: times less added memory than a copied cache", _peak(run_on_copy) / _peak(run_on_frozen), at_least=10
    )


@torch.no_grad()
def test_suffixes_against_full_sequences(device: str, record: Any) -> None:
    """The sequences run in batches of 8, so that their activations stay in proportion."""
    n_rows, n_new = 32, 8
    _, model = build_pair("gpt_neox", **_SIZES, device=device)
    prefix = torch.randint(0, 1000, (1, _N_PREFIX), device=device)
    suffixes = torch.randint(0, 1000, (n_rows, n_new), device=device)
    kv = model.prefill(prefix)
    whole = torch.cat([prefix.expand(n_rows, -1), suffixes], 1)

    def run_whole() -> torch.Tensor:
        return torch.cat([model(rows, logits_at=slice(_N_PREFIX, None)) for rows in whole.split(8)])

    def run_on_frozen() -> torch.Tensor:
        return model(suffixes, past_kv_cache=kv)

    torch.testing.assert_close(run_on_frozen(), run_whole(), rtol=1e-3, atol=1e-3)
    seconds = time_alternating({"frozen": run_on_frozen, "whole": run_whole}, rounds=2, warm_up=0)
    record(
        f"{n_rows} suffixes of {n_new} on {_N_PREFIX}, {device}: times faster than full sequences",
        seconds["whole"] / seconds["frozen"],
        at_least=40,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt_neox", "llama"])
@pytest.mark.parametrize("tracked", [False, True], ids=["alone", "with gradients"])
def test_suffixes_against_a_past_for_each_row(
    tracked: bool, family: str, dtype: torch.dtype, device: str, record: Any
) -> None:
    """The same model on a past that is expanded to all rows and joined with the new keys; llama's keys are shared."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("processors without bfloat16 instructions take minutes")
    n_rows, n_new = 32, 8
    _, model = build_pair(family, **_SIZES, device=device, dtype=dtype)
    prefix = torch.randint(0, 1000, (1, _N_PREFIX), device=device)
    suffixes = torch.randint(0, 1000, (n_rows, n_new), device=device)
    kv = model.prefill(prefix)
    first = model.blocks[0].ln1.w

    def run(past: Any) -> torch.Tensor:
        with torch.set_grad_enabled(tracked):
            if not tracked:
                return model(suffixes, past_kv_cache=past)
            loss = model(suffixes, past_kv_cache=past, return_type="loss")
            return torch.autograd.grad(loss, first)[0]

    def run_on_frozen() -> torch.Tensor:
        return run(kv)

    def run_on_expanded() -> torch.Tensor:
        return run(kv.expand(n_rows).unfreeze())

    # Twelve layers add up what each rounds.
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(run_on_frozen(), run_on_expanded(), rtol=tolerance, atol=tolerance)
    seconds = time_alternating(
        {"frozen": run_on_frozen, "expanded": run_on_expanded}, rounds=3 if device == "cpu" else 20, warm_up=1
    )
    what = f"{n_rows} suffixes of {n_new} on {_N_PREFIX}, {family}, {dtype}, {'with gradients, ' * tracked}{device}"
    record(f"{what}: ms", 1000 * seconds["frozen"])
    record(f"{what}: times faster than an expanded past", seconds["expanded"] / seconds["frozen"], at_least=1)
    frozen, expanded = _peak(run_on_frozen), _peak(run_on_expanded)
    record(f"{what}: added MiB", frozen / 2**20)
    record(f"{what}: times less added memory than an expanded past", expanded / frozen, at_least=2 if tracked else 10)


def _peak(call: Any) -> int:
    with PeakMemory() as memory:
        call()
    return memory.peak
