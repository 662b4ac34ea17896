"""Networks to call with and without a cache, and how far apart the logits may be.

Bounds: in float64 1e-10. In float32 1e-5, times the largest logit where that is above 1: the checkpoints of the
catalogue are random and wide, so logits of 10 and more occur, and a sum taken in another order is off by a share
of its size. `test_growing.py` shows that transformers needs the same.
"""

from functools import cache

import torch
from torch import Tensor

from hooklens import HookedCausalLM, HookedKeyValueCache
from tests.checkpoints import build_variant
from tests.model.networks import make_model, random_tokens

VARIANTS = ["neox-parallel", "llama-gqa", "falcon-7b", "falcon-40b", "falcon-rw", "falcon-alibi-parallel-mqa"]


@cache
def load(variant: str, dtype: torch.dtype = torch.float64) -> HookedCausalLM:
    return HookedCausalLM.from_hf(build_variant(variant, dtype=dtype))


@cache
def build(name: str, dtype: torch.dtype = torch.float64) -> HookedCausalLM:
    return make_model(name, dtype=dtype)


def bound(expected: Tensor) -> float:
    return 1e-10 if expected.dtype == torch.float64 else 1e-5 * max(1.0, float(expected.abs().max()))


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=bound(expected))


def read(kv: HookedKeyValueCache) -> list[Tensor]:
    parts = [tensor.clone() for entry in kv.entries for tensor in (entry.past_keys, entry.past_values)]
    return [*parts, kv.previous_attention_mask.clone()]


def draw_rows(lengths: list[int], *, seed: int, d_vocab: int = 23) -> list[Tensor]:
    return [random_tokens(1, n, d_vocab=d_vocab, seed=seed + i)[0] for i, n in enumerate(lengths)]
