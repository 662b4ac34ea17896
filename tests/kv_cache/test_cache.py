"""Tests of hooklens.kv_cache.cache: the cache as a value, and what it refuses."""

import copy

import numpy as np
import pytest
import torch

from hooklens import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.display import format_bytes
from hooklens.errors import CacheError
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens

CFG = make_config(n_kv_heads=2)


def fill(batch: int = 2, n: int = 5, *, frozen: bool = False, seed: int = 0) -> HookedKeyValueCache:
    """A cache of random tensors, its first row's first two columns padding."""
    generator = torch.Generator().manual_seed(seed)
    cache = HookedKeyValueCache.init_cache(CFG, batch_size=batch)
    for entry in cache.entries:
        keys, values = torch.randn(2, batch, n, CFG.n_kv_heads, CFG.d_head, generator=generator)
        entry.append(keys, values)
    mask = torch.ones(batch, n, dtype=torch.bool)
    mask[0, :2] = False
    cache.append_attention_mask(mask)
    cache.last_logits = torch.randn(batch, CFG.d_vocab, generator=generator)
    return cache.freeze() if frozen else cache


def read(cache: HookedKeyValueCache) -> list[torch.Tensor]:
    """Copies of everything in a cache."""
    parts = [tensor.clone() for entry in cache.entries for tensor in (entry.past_keys, entry.past_values)]
    return [*parts, cache.previous_attention_mask.clone()]


def assert_same(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def append_noise(cache: HookedKeyValueCache, n: int = 2) -> None:
    for entry in cache.entries:
        new = torch.randn(cache.batch_size, n, CFG.n_kv_heads, CFG.d_head)
        entry.append(new, new)
    cache.append_attention_mask(torch.ones(cache.batch_size, n, dtype=torch.bool))


def test_init_cache_is_empty():
    cache = HookedKeyValueCache.init_cache(CFG, batch_size=3, dtype=torch.bfloat16)
    assert (len(cache), cache.batch_size, len(cache.entries)) == (0, 3, CFG.n_layers)
    assert (cache.nbytes, cache.dtype, cache.frozen) == (0, torch.bfloat16, False)
    assert cache.last_logits is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nbytes_is_the_documented_memory_per_token(dtype):
    model = make_model("alibi, grouped", dtype=dtype)
    cfg = model.cfg
    cache = model.prefill(random_tokens(3, 7))
    assert cache.nbytes == 3 * 7 * 2 * cfg.n_layers * cfg.n_kv_heads * cfg.d_head * dtype.itemsize
    # A prefix takes no more than it needs.
    assert sum(2 * entry._held.keys.untyped_storage().nbytes() for entry in cache.entries) == cache.nbytes


@pytest.mark.parametrize(
    ("derive", "rows", "columns"),
    [
        (lambda cache: cache.clone(), [0, 1], 5),
        (lambda cache: cache.crop(3), [0, 1], 3),
        (lambda cache: cache.crop(0), [0, 1], 0),
        (lambda cache: cache.select([1]), [1], 5),
        (lambda cache: cache.select([1, 0, 1]), [1, 0, 1], 5),
        (lambda cache: cache.select(slice(1, None)), [1], 5),
        (lambda cache: cache.select(-1), [1], 5),
        (lambda cache: cache.select(None), [0, 1], 5),
        (lambda cache: cache.select(slice(None, None, -1)), [1, 0], 5),
        (lambda cache: cache.select(torch.tensor([1, 1, -2])), [1, 1, 0], 5),
        (lambda cache: cache.select(np.array([-1, 1])), [1, 1], 5),
        (copy.copy, [0, 1], 5),
        (lambda cache: cache.to("cpu", torch.float32), [0, 1], 5),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_derived_caches_hold_the_part_and_live_their_own_life(derive, rows, columns, frozen):
    cache = fill(frozen=frozen)
    cache.transforms = ("fold_ln", "fold_value_biases")
    before = read(cache)
    derived = derive(cache)
    expected = [tensor[rows][:, :columns] for tensor in before]
    assert_same(read(derived), expected)
    assert derived.frozen == frozen
    assert derived.fingerprint == cache.fingerprint
    assert derived.transforms == cache.transforms
    if columns == len(cache):
        assert torch.equal(derived.last_logits, cache.last_logits[rows])
    else:
        assert derived.last_logits is None
    append_noise(derived.unfreeze())
    assert len(derived) == columns + 2
    assert_same(read(cache), before)
    append_noise(cache.unfreeze(), 4)
    assert_same([tensor[:, :columns] for tensor in read(derived)], expected)


def test_expand_repeats_one_row_without_a_copy():
    cache = fill(1, frozen=True)
    cache.transforms = ("fold_ln",)
    expanded = cache.expand(4)
    assert expanded.transforms == ("fold_ln",)
    assert expanded.batch_size == 4
    assert expanded.last_logits.shape == (4, CFG.d_vocab)
    shared = cache.entries[0].past_keys.untyped_storage().data_ptr()
    assert expanded.entries[0].past_keys.untyped_storage().data_ptr() == shared
    append_noise(expanded.unfreeze())
    assert len(expanded) == len(cache) + 2
    with pytest.raises(CacheError, match="only a cache of one row can be expanded; this one has 2"):
        fill(2).expand(3)


def test_to_changes_dtype():
    cache = fill(frozen=True)
    half = cache.to(dtype=torch.bfloat16)
    assert (half.dtype, half.last_logits.dtype, half.nbytes) == (torch.bfloat16, torch.bfloat16, cache.nbytes // 2)
    assert torch.equal(half.entries[1].past_values, cache.entries[1].past_values.bfloat16())
    assert half.previous_attention_mask.dtype == torch.bool


def test_frozen_context_restores_what_was():
    for before in (True, False):
        cache = fill(frozen=before)
        with cache.frozen_context() as inside:
            assert inside is cache
            assert cache.frozen
            assert all(entry.frozen for entry in cache.entries)
        assert cache.frozen == before
        with pytest.raises(ZeroDivisionError), cache.frozen_context():
            raise ZeroDivisionError
        assert cache.frozen == before
        assert all(entry.frozen == before for entry in cache.entries)


def test_masks_are_joined_and_kept_unless_frozen():
    cache = fill(2, 3)
    new = torch.tensor([[1, 0], [1, 1]])
    joined = cache.append_attention_mask(new.bool())
    assert joined.tolist() == [[False, False, True, True, False], [True] * 5]
    assert cache.previous_attention_mask is joined
    cache = fill(1, 3, frozen=True)
    joined = cache.append_attention_mask(torch.ones(4, 2, dtype=torch.bool))
    assert joined.shape == (4, 5)
    assert cache.previous_attention_mask.shape == (1, 3)
    with pytest.raises(CacheError, match="has 3 rows, the cache 2; only a frozen cache with one row"):
        fill(2).append_attention_mask(torch.ones(3, 1, dtype=torch.bool))


@pytest.mark.parametrize("frozen", [False, True])
def test_freezing_single_entries_is_refused_with_the_reason(frozen):
    cache = fill(frozen=frozen)
    cache.entries[1].frozen = not frozen
    with pytest.raises(CacheError, match=r"the entries of layers \[1\] are .*its layers would hold different tokens"):
        cache.check_consistent()
    cache.freeze().check_consistent()
    cache.unfreeze().check_consistent()


def test_layers_with_different_tokens_are_refused():
    cache = fill()
    cache.entries[1].append(*torch.randn(2, 2, 1, CFG.n_kv_heads, CFG.d_head))
    with pytest.raises(CacheError, match=r"2 rows of 5 columns, but layers \[1\] hold \(rows, columns\) \[\(2, 6\)\]"):
        cache.check_consistent()
    keys = torch.zeros(1, 3, 2, 6)
    with pytest.raises(CacheError, match=r"layers \[0\] hold \(rows, columns\) \[\(1, 3\)\]"):
        HookedKeyValueCache([HookedKeyValueCacheEntry(keys, keys)], torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(CacheError, match="needs at least one entry"):
        HookedKeyValueCache([], torch.ones(1, 4, dtype=torch.bool))


def test_parts_out_of_range_are_refused():
    cache = fill()
    for n in (-1, 6):
        with pytest.raises(CacheError, match=f"crop: n is {n}, expected a whole number, 0 to 5"):
            cache.crop(n)
        with pytest.raises(CacheError, match=f"roll_back: n_columns is {n}, expected a whole number, 0 to 5"):
            cache.roll_back(n)
    with pytest.raises(CacheError, match="expand: n is 0, expected a whole number >= 1"):
        fill(1).expand(0)
    with pytest.raises(CacheError, match=r"rows: \[2, -3\] out of range; there are 2 rows in the cache, 0 to 1"):
        cache.select([0, 2, -3, 0])
    with pytest.raises(CacheError, match=r"rows=\[\] is empty"):
        cache.select([])
    with pytest.raises(CacheError, match=r"rows=slice\(2, 9, None\) names none of the 2 rows in the cache"):
        cache.select(slice(2, 9))


@pytest.mark.parametrize(
    "mask", [[True, False], [1, True], torch.tensor([False, True]), np.array([True, True]), [np.False_, np.True_]]
)
def test_masks_do_not_select_rows(mask):
    """`[True, False]` was read as a mask and `[1, True]` as rows 1 and 1."""
    with unchecked(), pytest.raises(CacheError, match=r"is a mask; give the numbers .*mask.nonzero\(\)\[:, 0\]"):
        fill().select(mask)


def test_another_models_cache_is_refused():
    model = make_model(CFG, dtype=torch.float32)
    tokens = random_tokens(2, 3)
    others = {
        r"\(layers, key-value heads, d_head\) \(2, 2, 6\), the model \(2, 4, 6\)": CFG.replace(n_kv_heads=4),
        "another configuration": CFG.replace(act_fn="relu"),
    }
    for text, cfg in others.items():
        with pytest.raises(CacheError, match=text):
            make_model(cfg, dtype=torch.float32)(tokens, past_kv_cache=fill())
    for cache in (fill().to(dtype=torch.bfloat16), fill().to("meta")):
        with pytest.raises(CacheError, match=r"the model torch.float32 on cpu; convert it with cache.to\(device, dtyp"):
            model(tokens, past_kv_cache=cache)


def test_batches_that_a_cache_cannot_serve_are_refused():
    model = make_model(CFG, dtype=torch.float32)
    with pytest.raises(CacheError, match="the cache has 2 rows and the input 3; use select"):
        model(random_tokens(3, 2), past_kv_cache=fill(2, frozen=True))
    with pytest.raises(CacheError, match="the cache has 1 rows and the input 3; freeze it"):
        model(random_tokens(3, 2), past_kv_cache=fill(1))


def test_repr_says_what_it_is():
    assert repr(fill(frozen=True)).splitlines()[0] == (
        f"HookedKeyValueCache(frozen, 2 layers, batch=2, pos=5, {format_bytes(fill().nbytes)})"
    )
    assert repr(fill()).startswith("HookedKeyValueCache(2 layers")
