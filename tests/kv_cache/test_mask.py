"""Tests of hooklens.kv_cache.mask: whether a cache holds padding, known without asking the device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hooklens import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.errors import CacheError
from tests.annotations import unchecked
from tests.kv_cache.test_cache import CFG, append_noise, fill
from tests.kv_cache.test_entry import draw, make_entry

WAITING = {"_local_scalar_dense", "nonzero", "equal", "item", "is_nonzero", "masked_select", "unique"}


class WaitedError(Exception):
    """An operation that waits for the device ran."""


class NoWaiting(TorchDispatchMode):
    """Refuses the operations whose result the host has to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in WAITING:
            raise WaitedError(str(func))
        return func(*args, **(kwargs or {}))


def test_the_watch_of_this_file_sees_what_waits():
    for wait in (lambda x: x.any().item(), lambda x: bool(x.all()), torch.nonzero, lambda x: x.tolist(), list):
        with pytest.raises(WaitedError), NoWaiting():
            wait(torch.ones(3, dtype=torch.bool)) and [bool(one) for one in torch.ones(2)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_model_call_asks_the_device_nothing(frozen, padded, batch):
    """What a call does with a cache; each call looked at all values of the mask, which waits for the device."""
    cache = fill(batch) if padded else HookedKeyValueCache.init_cache(CFG, batch_size=batch)
    if not padded:
        append_noise(cache, 5)
    cache = cache.freeze() if frozen else cache
    new = torch.randn(batch, 1, CFG.n_kv_heads, CFG.d_head)
    mask = torch.ones(batch, 1, dtype=torch.bool)
    with torch.no_grad(), NoWaiting():
        for _ in range(4):
            cache.check_fits(CFG, transforms=(), device=torch.device("cpu"), dtype=torch.float32, batch=batch)
            assert cache.has_padding == padded
            assert cache.previous_attention_mask.shape == (batch, len(cache))
            for entry in cache.entries:
                entry.append(new, new)
            cache.append_attention_mask(mask, all_tokens=True)
        assert cache.has_padding == padded
        assert cache.last_logits is None or frozen
        # Ways to a part of a cache without padding, of the whole of any cache, and back.
        parts = [cache.clone(), cache.to(dtype=torch.float64), cache.crop(len(cache))]
        parts += [cache.expand(3)] if batch == 1 else []
        parts += [] if padded else [cache.crop(2), cache.select(slice(0, 1))]
        assert all(part.has_padding == padded for part in parts)
        if not frozen:
            cache.roll_back(len(cache) - 0)
    assert len(cache) == (5 if frozen else 9)


def test_padding_is_known_from_the_mask_that_was_given():
    entries = [HookedKeyValueCacheEntry(*torch.randn(2, 2, 3, CFG.n_kv_heads, CFG.d_head)) for _ in range(2)]
    mask = torch.ones(2, 3, dtype=torch.bool)
    cache = HookedKeyValueCache(entries, mask)
    assert not cache.has_padding
    for new, hides in ([1, 1], False), ([1, 0], True), ([1, 1], True):
        column = torch.randn(2, 1, CFG.n_kv_heads, CFG.d_head)
        for entry in entries:
            entry.append(column, column)
        cache.append_attention_mask(torch.tensor(new, dtype=torch.bool)[:, None])
        assert cache.has_padding == hides
    assert not cache.crop(4).has_padding
    assert not cache.select([0]).has_padding
    assert cache.select([1, 0]).has_padding
    cache.roll_back(4)
    assert not cache.has_padding


def test_the_callers_word_is_taken():
    cache = fill(1).crop(0)
    append_noise(cache, 0)
    cache.append_attention_mask(torch.ones(1, 0, dtype=torch.bool), all_tokens=True)
    assert not cache.has_padding
    for entry in cache.entries:
        entry.append(*torch.randn(2, 1, 2, CFG.n_kv_heads, CFG.d_head))
    cache.append_attention_mask(torch.tensor([[False, True]]), all_tokens=False)
    assert cache.has_padding


def test_a_frozen_cache_keeps_its_padding_to_itself():
    cache = fill(1, frozen=True)
    joined = cache.append_attention_mask(torch.zeros(3, 1, dtype=torch.bool))
    assert joined.shape == (3, 6)
    assert not joined[:, -1].any()
    assert cache.previous_attention_mask.shape == (1, 5)


def test_a_mask_that_is_changed_in_place_is_looked_at_again():
    cache = HookedKeyValueCache.init_cache(CFG)
    append_noise(cache, 3)
    part = cache.crop(2)
    cache.previous_attention_mask[0, 0] = False
    assert cache.has_padding
    assert part.has_padding
    cache.previous_attention_mask[0, 0] = True
    assert not cache.has_padding


def test_setting_the_mask():
    cache = fill(2)
    cache.previous_attention_mask = torch.ones(2, 5, dtype=torch.bool)
    assert not cache.has_padding
    with pytest.raises(CacheError, match=r"covers 2 rows of 4 columns, but layers \[0, 1\]"):
        cache.previous_attention_mask = torch.ones(2, 4, dtype=torch.bool)
    assert cache.previous_attention_mask.shape == (2, 5)


def test_masks_of_numbers_are_read_and_other_numbers_refused():
    """Any number but 0 counted as a token."""
    keys = draw(1, 3)
    with unchecked():
        cache = HookedKeyValueCache([HookedKeyValueCacheEntry(keys, keys)], torch.tensor([[0, 1, 1]]))
        assert cache.previous_attention_mask.tolist() == [[False, True, True]]
        assert cache.has_padding
        with pytest.raises(CacheError, match=r"previous_attention_mask \(torch.int64\) holds values other than 0"):
            HookedKeyValueCache([make_entry(1, 3)], torch.tensor([[0, 1, 2]]))
        with pytest.raises(CacheError, match=r"mask_of_new_tokens \(torch.float32\) holds values other than 0"):
            fill().append_attention_mask(torch.full((2, 1), float("-inf")))


def test_a_mask_without_data_may_hide_something():
    cache = HookedKeyValueCache([make_entry(1, 3)], torch.ones(1, 3, dtype=torch.bool, device="meta"))
    assert cache.has_padding
    assert not HookedKeyValueCache.init_cache(CFG, "meta").has_padding
