"""Caches under torch.autocast and torch.inference_mode, from which and to which they are carried."""

from contextlib import nullcontext

import pytest
import torch

from hooklens import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.errors import CacheError
from tests.kv_cache.test_cache import CFG, append_noise, fill
from tests.kv_cache.test_entry import D_HEAD, HEADS, draw, make_entry
from tests.model.networks import make_model, random_tokens

HALF = torch.bfloat16


def autocast():
    return torch.autocast("cpu", HALF)


class TestEntries:
    @pytest.mark.parametrize(("keys", "values"), [(HALF, HALF), (torch.float32, HALF), (torch.float64, torch.float32)])
    @pytest.mark.parametrize("frozen", [False, True])
    def test_an_empty_entry_takes_what_comes_first(self, keys, values, frozen):
        """Keys and values may differ: under autocast a rotation leaves keys in float32. Each keeps its own."""
        entry = make_entry(2, 0, frozen=frozen)
        parts = [(draw(2, n, n, keys), draw(2, n, n + 5, values)) for n in (1, 3, 2)]
        for count, (new_keys, new_values) in enumerate(parts, 1):
            got = entry.append(new_keys, new_values)
            first = count - 1 if frozen else 0
            for found, expected in zip(got, zip(*parts[first:count], strict=True), strict=True):
                assert found.dtype == expected[0].dtype
                assert torch.equal(found, torch.cat(expected, 1))
        assert len(entry) == (0 if frozen else 6)

    def test_a_filled_entry_takes_its_own_only(self):
        entry = make_entry(2, 2)
        text = (
            r"new {} are \[2, 1, 2, 3\] torch.bfloat16 on cpu; .*torch.float32 on cpu\. Under torch.autocast .*run "
            r"prefill and continuation both inside or both outside of torch.autocast, or convert the cache with "
            r"cache.to\(dtype="
        )
        with pytest.raises(CacheError, match=text.format("keys")):
            entry.append(draw(2, 1, dtype=HALF), draw(2, 1))
        with pytest.raises(CacheError, match=text.format("values")):
            entry.append(draw(2, 1), draw(2, 1, dtype=HALF))
        assert len(entry) == 2

    def test_no_columns_change_no_dtype(self):
        entry = make_entry(2, 0)
        entry.append(draw(2, 0, dtype=HALF), draw(2, 0, dtype=HALF))
        assert entry.past_keys.dtype == torch.float32

    def test_a_cache_of_two_dtypes_is_carried_on_and_saved(self, tmp_path):
        entries = [HookedKeyValueCacheEntry(draw(1, 3, 1), draw(1, 3, 2, HALF)) for _ in range(2)]
        cache = HookedKeyValueCache(entries, torch.ones(1, 3, dtype=torch.bool))
        assert cache.dtype == torch.float32
        assert cache.nbytes == 2 * 3 * HEADS * D_HEAD * (4 + 2)
        cache.save(tmp_path / "file")
        for other in (cache.clone(), cache.crop(2), cache.expand(2), HookedKeyValueCache.load(tmp_path / "file")):
            entry = other.entries[1]
            assert (entry.past_keys.dtype, entry.past_values.dtype) == (torch.float32, HALF)
        assert cache.to(dtype=HALF).entries[0].past_keys.dtype == HALF


class TestAutocast:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("network", "frozen"), [("grouped", False), ("alibi, grouped", False), ("alibi, grouped", True)]
    )
    def test_prefill_and_continuation_inside(self, network, frozen):
        """A cache in the model's dtype refused the keys and values that autocast computes in another one."""
        model = make_model(network, dtype=torch.float32)
        tokens = random_tokens(1, 9)
        with autocast():
            kv = model.prefill(tokens[:, :5])
            assert kv.entries[0].past_values.dtype == HALF
            kv = kv if frozen else kv.unfreeze()
            parts = [model(tokens[:, 5:7], past_kv_cache=kv)]
            whole = model(tokens[:, :7])[:, 5:]
            if not frozen:
                parts.append(model(tokens[:, 7:], past_kv_cache=kv))
                whole = model(tokens)[:, 5:]
        # bfloat16 keeps 8 bits; the largest logits are of order 1.
        torch.testing.assert_close(torch.cat(parts, 1).float(), whole.float(), rtol=0.05, atol=0.05)

    @torch.no_grad()
    @pytest.mark.parametrize("network", ["grouped", "alibi, grouped"])
    def test_one_inside_and_one_outside(self, network):
        model = make_model(network, dtype=torch.float32)
        tokens = random_tokens(1, 5)
        with autocast():
            inside = model.prefill(tokens)
        text = "both inside or both outside of torch.autocast"
        with pytest.raises(CacheError, match=f"the model torch.float32 on cpu; convert it with cache.to.*{text}"):
            model(tokens, past_kv_cache=inside)
        converted = inside.to(dtype=torch.float32)
        assert model(tokens, past_kv_cache=converted).dtype == torch.float32
        outside = model.prefill(tokens)
        with autocast(), pytest.raises(CacheError, match=f"computes in torch.bfloat16 under torch.autocast; .*{text}"):
            model(tokens, past_kv_cache=outside)

    @torch.no_grad()
    def test_a_converted_cache_goes_on_under_autocast(self):
        """Rotated keys came in float32, values in bfloat16, and no conversion gave a cache both."""
        model = make_model("grouped", dtype=torch.float32)
        kv = model.prefill(random_tokens(1, 5)).to(dtype=HALF).unfreeze()
        with autocast():
            model(random_tokens(1, 2), past_kv_cache=kv)
        kv.check_consistent()
        assert len(kv) == 7
        assert {kv.entries[0].past_keys.dtype, kv.entries[0].past_values.dtype} == {HALF}

    @torch.no_grad()
    @pytest.mark.parametrize("network", ["grouped", "alibi, grouped"])
    def test_float64_is_left_alone_by_autocast(self, network):
        model = make_model(network, dtype=torch.float64)
        kv = model.prefill(random_tokens(1, 5))
        with autocast():
            assert model(random_tokens(2, 2), past_kv_cache=kv).dtype == torch.float64


def test_an_empty_cache_fits_any_dtype_and_a_full_one_its_own():
    def check(cache, dtype):
        cache.check_fits(CFG, transforms=(), device=torch.device("cpu"), dtype=dtype, batch=1)

    check(HookedKeyValueCache.init_cache(CFG), torch.float64)
    check(fill(1), torch.float32)
    with pytest.raises(CacheError, match=r"the cache is torch.float32 on cpu, the model torch.float64 on cpu; "):
        check(fill(1), torch.float64)


MODES = [torch.inference_mode, torch.no_grad, nullcontext]


@pytest.mark.parametrize("network", ["grouped", "alibi, grouped"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("using", MODES)
@pytest.mark.parametrize("filling", MODES)
def test_a_cache_goes_from_any_mode_into_any_other(network, frozen, filling, using):
    """Tensors of inference_mode can outside of it neither be written to nor be saved for a backward pass."""
    model = make_model(network)
    tokens = random_tokens(2, 9)
    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=model.dtype)
    with filling():
        for column in range(5):
            model(tokens[:, column : column + 1], past_kv_cache=kv)
        kv = kv.select([1, 0]).to("cpu")
        kv = kv.freeze() if frozen else kv
    order = tokens[[1, 0]]
    with using():
        logits = model(order[:, 5:7], past_kv_cache=kv)
        if not frozen:
            logits = torch.cat([logits, model(order[:, 7:], past_kv_cache=kv)], 1)
    expected = model(order[:, : len(order[0]) if not frozen else 7])[:, 5:]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
    if using is nullcontext:
        logits.sum().backward()
        assert all(part.grad is not None for part in model.parameters())
    if not frozen:
        model(order[:, :1], past_kv_cache=kv)


@pytest.mark.parametrize("frozen", [False, True])
def test_entries_made_of_inference_tensors_can_be_differentiated_through(frozen):
    with torch.inference_mode():
        keys = draw(1, 3)
        assert keys.is_inference()
        entry = HookedKeyValueCacheEntry(keys, keys, frozen)
        mask = torch.ones(1, 3, dtype=torch.bool)
        cache = HookedKeyValueCache([entry], mask)
    q = torch.ones(D_HEAD, requires_grad=True)
    (entry.past_keys @ q).sum().backward()
    torch.testing.assert_close(q.grad, draw(1, 3).sum((0, 1, 2)))
    assert not cache.previous_attention_mask.is_inference()
    assert not cache.has_padding
    # Converted once, not at every reading.
    assert entry.past_keys.data_ptr() == entry.past_keys.data_ptr()
    new = draw(1, 1).requires_grad_()
    got, _ = entry.append(new, new)
    got.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))


@pytest.mark.parametrize("derive", [lambda cache: cache.clone(), lambda cache: cache.select([0]), lambda c: c.crop(2)])
def test_parts_made_under_inference_mode_hold_no_inference_tensors(derive):
    cache = fill(1)
    with torch.inference_mode():
        made = derive(cache)
        append_noise(made)
    tensors = [made.previous_attention_mask, made.entries[0].past_keys, made.entries[1].past_values]
    assert not any(tensor.is_inference() for tensor in tensors)
    assert made.last_logits is None or not made.last_logits.is_inference()


def test_gradients_reach_the_tensors_an_entry_is_made_of():
    """A prefix can be learned: what was appended keeps no graph, what the caller gave does."""
    learned = draw(1, 2).requires_grad_()
    entry = HookedKeyValueCacheEntry(learned, learned, frozen=True)
    for _ in range(2):
        keys, values = entry.append(draw(1, 1), draw(1, 1))
        (keys.sum() + values.sum()).backward()
    assert torch.equal(learned.grad, torch.full_like(learned, 4))
