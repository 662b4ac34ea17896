"""Tests of hooklens.kv_cache.entry: an entry alone, against lists of tensors joined by `torch.cat`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hooklens import HookedKeyValueCacheEntry
from hooklens.errors import CacheError
from tests.annotations import unchecked
from tests.model.networks import make_config

HEADS, D_HEAD = 2, 3


def draw(batch: int, n: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(batch, n, HEADS, D_HEAD, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_entry(batch: int = 1, n: int = 0, *, frozen: bool = False) -> HookedKeyValueCacheEntry:
    return HookedKeyValueCacheEntry(draw(batch, n, 1), draw(batch, n, 2), frozen)


class CopiedEntries(TorchDispatchMode):
    """Counts the numbers that are copied into buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default:
            self.count += args[1].numel()
        return func(*args, **(kwargs or {}))


def test_empty_entry_has_the_models_shape():
    cfg = make_config(n_kv_heads=2)
    entry = HookedKeyValueCacheEntry.init_cache_entry(cfg, batch_size=3, dtype=torch.float64)
    assert entry.past_keys.shape == entry.past_values.shape == (3, 0, 2, cfg.d_head)
    assert entry.past_keys.dtype == torch.float64
    assert (len(entry), entry.batch_size, entry.frozen) == (0, 3, False)


@settings(max_examples=60)
@given(batch=st.integers(1, 3), sizes=st.lists(st.integers(0, 5), max_size=8), n_first=st.integers(0, 4))
def test_appends_add_up_to_the_joined_tensor(batch, sizes, n_first):
    entry = make_entry(batch, n_first)
    keys, values = [draw(batch, n_first, 1)], [draw(batch, n_first, 2)]
    handed_out = []
    for step, size in enumerate(sizes):
        keys.append(draw(batch, size, 10 + step))
        values.append(draw(batch, size, 90 + step))
        handed_out.append((entry.append(keys[-1], values[-1]), torch.cat(keys, 1), torch.cat(values, 1)))
        assert len(entry) == n_first + sum(sizes[: step + 1])
        assert torch.equal(entry.past_keys, torch.cat(keys, 1))
        assert torch.equal(entry.past_values, torch.cat(values, 1))
    for (got_keys, got_values), expected_keys, expected_values in handed_out:
        # Later appends leave what earlier ones gave as it was.
        assert torch.equal(got_keys, expected_keys)
        assert torch.equal(got_values, expected_values)


@pytest.mark.parametrize("n", [50, 400])
def test_appending_one_by_one_moves_a_multiple_of_n(n):
    """Each number is written once, and moved by each doubling: less than twice more, for keys and for values."""
    entry = make_entry()
    new = draw(1, 1)
    with CopiedEntries() as copied:
        for _ in range(n):
            entry.append(new, new)
    written = 2 * n * HEADS * D_HEAD
    assert written <= copied.count < 3 * written


def test_frozen_entry_gives_the_whole_and_stores_nothing():
    entry = make_entry(2, 4, frozen=True)
    before = entry.past_keys.clone()
    keys, values = entry.append(draw(2, 3, 5), draw(2, 3, 6))
    assert torch.equal(keys, torch.cat([draw(2, 4, 1), draw(2, 3, 5)], 1))
    assert torch.equal(values, torch.cat([draw(2, 4, 2), draw(2, 3, 6)], 1))
    assert len(entry) == 4
    assert torch.equal(entry.past_keys, before)


def test_frozen_entry_of_one_row_serves_several():
    keys, _ = make_entry(1, 4, frozen=True).append(draw(3, 2, 5), draw(3, 2, 6))
    assert torch.equal(keys, torch.cat([draw(1, 4, 1).expand(3, -1, -1, -1), draw(3, 2, 5)], 1))


def test_stored_tensors_keep_no_graph_and_the_returned_ones_do():
    entry = make_entry(1, 2)
    new = draw(1, 3).requires_grad_()
    keys, _ = entry.append(new, new)
    assert keys.requires_grad
    assert not entry.past_keys.requires_grad
    keys.sum().backward()
    assert torch.equal(new.grad, torch.ones_like(new))


def test_roll_back_forgets_and_the_next_append_takes_the_place():
    entry = make_entry(1, 4)
    entry.append(draw(1, 3, 7), draw(1, 3, 7))
    entry.roll_back(4)
    assert torch.equal(entry.past_keys, draw(1, 4, 1))
    entry.append(draw(1, 1, 8), draw(1, 1, 8))
    assert torch.equal(entry.past_keys, torch.cat([draw(1, 4, 1), draw(1, 1, 8)], 1))


def test_entry_filled_under_inference_mode_can_be_appended_to_outside():
    """The buffer with room for more was an inference tensor, which refuses to be written to outside of that mode."""
    entry = make_entry()
    with torch.inference_mode():
        for seed in (1, 2, 3):
            entry.append(draw(1, 1, seed), draw(1, 1, seed))
    assert entry._held.keys.shape[1] > len(entry)
    entry.append(draw(1, 1, 4), draw(1, 1, 4))
    assert torch.equal(entry.past_keys, torch.cat([draw(1, 1, seed) for seed in (1, 2, 3, 4)], 1))


@pytest.mark.parametrize(
    ("new", "found"),
    [
        (draw(3, 1), r"new keys are \[3, 1, 2, 3\].*takes 2 rows"),
        (draw(2, 1, dtype=torch.float64), "torch.float64 on cpu; .*torch.float32 on cpu"),
        (torch.zeros(2, 1, HEADS + 1, D_HEAD), "2 key-value heads of width 3"),
        (torch.zeros(2, 1, HEADS, D_HEAD, device="meta"), "on meta"),
    ],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_new_tensors_that_do_not_fit_are_refused(new, found, frozen):
    entry = make_entry(2, 4, frozen=frozen)
    with pytest.raises(CacheError, match=found):
        entry.append(new, new)
    with unchecked(), pytest.raises(CacheError, match="new values"):
        entry.append(draw(2, 1), new)
    assert len(entry) == 4


def test_new_keys_and_values_must_have_one_length():
    entry = make_entry(2, 4)
    with unchecked(), pytest.raises(CacheError, match=r"new keys are \[2, 1, 2, 3\], new values \[2, 2, 2, 3\]"):
        entry.append(draw(2, 1), draw(2, 2))
    assert len(entry) == 4


def test_keys_and_values_must_go_together():
    text = r"past keys are \[1, 2, 2, 3\].*past values \[1, 3, 2, 3\].*the same shape"
    with unchecked(), pytest.raises(CacheError, match=text):
        HookedKeyValueCacheEntry(draw(1, 2), draw(1, 3))
    with pytest.raises(CacheError, match=r"on cpu, past values .* on meta; expected the same shape and device"):
        HookedKeyValueCacheEntry(draw(1, 2), draw(1, 2).to("meta"))
