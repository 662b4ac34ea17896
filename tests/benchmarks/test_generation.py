"""Decoding against transformers' `generate` with its cache, and the time per token as the sequence grows."""

from typing import Any

import pytest
import torch

from hooklens.kv_cache import HookedKeyValueCache
from tests.benchmarks.alternate import time_alternating
from tests.benchmarks.models import FAMILIES, build_pair

_N_NEW = 60


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decoding(family: str, benchmark: Any, record: Any, one_thread: None, device: str) -> None:
    """6 layers, d_model 128, one thread, a prompt of 16 tokens, greedy."""
    reference, model = build_pair(family, n_layers=6, d_model=128, n_heads=4, device=device)
    prompt = torch.randint(0, 1000, (1, 16), device=device)

    def theirs() -> Any:
        return reference.generate(prompt, max_new_tokens=_N_NEW, min_new_tokens=_N_NEW, do_sample=False, pad_token_id=0)

    def ours() -> Any:
        return model.generate(prompt, max_new_tokens=_N_NEW, do_sample=False, stop_at_eos=False, verbose=False)

    seconds = time_alternating({"transformers": theirs, "hooklens": ours}, rounds=10, warm_up=1)
    record(
        f"decoding, {family}, {device}: tokens per second / transformers",
        seconds["transformers"] / seconds["hooklens"],
        at_least=1.4,
    )
    benchmark.extra_info.update({f"ms per token {name}": value / _N_NEW * 1e3 for name, value in seconds.items()})
    benchmark.pedantic(ours, rounds=2)


@torch.no_grad()
def test_time_per_token_stays_flat(record: Any, one_thread: None) -> None:
    """One step at 2,000 cached tokens against one at 100, less the attention itself, which reads twenty times as much.

    Attention over n keys is measured by the same kernel on tensors of the model's shapes.
    """
    _, model = build_pair("gpt_neox", n_layers=6, d_model=128, n_heads=4, n_ctx=4096)
    caches = {}
    for length in (100, 2000):
        kv = HookedKeyValueCache.init_cache(model.cfg)
        model(torch.randint(0, 1000, (1, length)), past_kv_cache=kv, logits_at=-1)
        # Past the first growth of the buffers, which a step of a long generation seldom sees.
        model(torch.randint(0, 1000, (1, 1)), past_kv_cache=kv)
        caches[length] = kv
    token = torch.randint(0, 1000, (1, 1))
    # Memory of its own for each layer: in a model nothing stays in the processor's cache from layer to layer.
    attention = {
        n: [tuple(torch.randn(1, m, 4, 32).transpose(1, 2) for m in (1, n, n)) for _ in range(6)] for n in (100, 2000)
    }

    def attend(n: int) -> None:
        for q, k, v in attention[n]:
            torch.nn.functional.scaled_dot_product_attention(q, k, v)

    seconds = time_alternating(
        {
            "100": lambda: model(token, past_kv_cache=caches[100]),
            "2000": lambda: model(token, past_kv_cache=caches[2000]),
            "attention 100": lambda: attend(100),
            "attention 2000": lambda: attend(2000),
        },
        rounds=150,
    )
    apart = {n: seconds[n] - seconds[f"attention {n}"] for n in ("100", "2000")}
    record("decode step at 2,000 tokens / at 100, attention taken out", apart["2000"] / apart["100"], at_most=1.2)
