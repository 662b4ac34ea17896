"""A cache that is appended to: splits of a sequence, single tokens, padded rows."""

import pytest
import torch

from hooklens import HookedKeyValueCache
from tests.cached_calls.networks import VARIANTS, assert_close, bound, draw_rows, load
from tests.checkpoints import build_variant
from tests.model.networks import pad_rows, random_tokens

N = 9


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_split_of_a_sequence(variant, dtype):
    model = load(variant, dtype)
    tokens = random_tokens(2, N)
    expected = model(tokens)
    for split in range(1, N):
        kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=dtype)
        first = model(tokens[:, :split], past_kv_cache=kv)
        second = model(tokens[:, split:], past_kv_cache=kv)
        assert_close(torch.cat([first, second], 1), expected)
        assert len(kv) == N
        frozen = model.prefill(tokens[:, :split])
        assert_close(model(tokens[:, split:], past_kv_cache=frozen), expected[:, split:])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_token_at_a_time(variant, dtype):
    model = load(variant, dtype)
    tokens = random_tokens(2, N)
    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=dtype)
    logits = [model(tokens[:, i : i + 1], past_kv_cache=kv) for i in range(N)]
    assert_close(torch.cat(logits, 1), model(tokens))


@torch.no_grad()
def test_bound_is_what_transformers_own_cache_needs():
    """On the variant with the largest logits, transformers' cached and uncached logits are as far apart as ours."""
    tokens = random_tokens(2, N)
    hf_model = build_variant("llama-gqa")
    expected, past, steps = hf_model(tokens).logits, None, []
    for i in range(N):
        out = hf_model(tokens[:, i : i + 1], past_key_values=past, use_cache=True)
        past = out.past_key_values
        steps.append(out.logits)
    theirs = float((torch.cat(steps, 1) - expected).abs().max())
    model = load("llama-gqa", torch.float32)
    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2)
    logits = torch.cat([model(tokens[:, i : i + 1], past_kv_cache=kv) for i in range(N)], 1)
    ours = float((logits - model(tokens)).abs().max())
    assert float(expected.abs().max()) > 5
    assert 0 < theirs <= bound(expected)
    assert ours <= 3 * theirs


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_left_padded_prefixes_and_suffixes(variant, frozen):
    """Prefix and suffix of each row padded or not, in all combinations, against the row alone."""
    model = load(variant)
    prefixes, suffixes = draw_rows([5, 3, 5, 2], seed=1), draw_rows([4, 4, 1, 3], seed=9)
    prefix_ids, prefix_mask = pad_rows(prefixes, "left")
    suffix_ids, suffix_mask = pad_rows(suffixes, "left")
    if frozen:
        kv = model.prefill(prefix_ids, attention_mask=prefix_mask)
    else:
        kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=4, dtype=torch.float64)
        model(prefix_ids, attention_mask=prefix_mask, past_kv_cache=kv)
    logits = model(suffix_ids, attention_mask=suffix_mask, past_kv_cache=kv)
    for i, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        alone = model(torch.cat([prefix, suffix])[None])
        assert_close(logits[i][suffix_mask[i].bool()], alone[0, len(prefix) :])
        if frozen:
            assert_close(kv.last_logits[i], alone[0, len(prefix) - 1])
