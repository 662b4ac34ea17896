"""The calls of a generation: prompts once, key-value caches given and kept, and as much work for each token."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import CacheError
from hooklens.kv_cache import HookedKeyValueCacheEntry
from tests.annotations import unchecked
from tests.generation.networks import pair


def test_frozen_prefix_serves_all_prompts_and_stays_as_it_is():
    model, _ = pair()
    prefix = torch.tensor([[5, 17, 80, 3]])
    kv = model.prefill(prefix)
    before = [entry.past_keys.clone() for entry in kv.entries]
    suffixes = torch.tensor([[61, 2], [33, 12]])
    expected = model.generate(
        torch.cat([prefix.expand(2, -1), suffixes], 1), do_sample=False, max_new_tokens=8, verbose=False
    )[:, 4:]
    for _ in range(2):
        ours = model.generate(suffixes, past_kv_cache=kv, do_sample=False, max_new_tokens=8, verbose=False)
        assert ours.tolist() == expected.tolist()
    assert len(kv) == 4
    assert kv.frozen
    assert all(torch.equal(entry.past_keys, keys) for entry, keys in zip(kv.entries, before, strict=True))
    samples = model.generate(
        suffixes, past_kv_cache=kv, num_return_sequences=3, max_new_tokens=4, seed=0, verbose=False
    )
    assert samples.shape == (6, 6)


def test_unfrozen_cache_is_appended_to_and_goes_on():
    model, _ = pair()
    prompt = torch.tensor([[5, 17, 80, 3], [9, 4, 7, 7]])
    once = model.generate(prompt, do_sample=False, max_new_tokens=9, verbose=False)
    kv = model.prefill(prompt[:, :3]).unfreeze()
    first = model.generate(prompt[:, 3:], past_kv_cache=kv, do_sample=False, max_new_tokens=4, verbose=False)
    assert len(kv) == 3 + 1 + 3
    second = model.generate(first[:, -1:], past_kv_cache=kv, do_sample=False, max_new_tokens=5, verbose=False)
    assert torch.cat([prompt[:, :3], first, second[:, 1:]], 1).tolist() == once.tolist()


def test_unfrozen_cache_masks_what_follows_a_rows_end():
    model, _ = pair()
    prompt = torch.tensor([[5, 17, 80, 3], [9, 4, 7, 7]])
    once = model.generate(prompt, do_sample=False, max_new_tokens=6, verbose=False)
    end = int(once[0, 5])
    assert end not in once[1, 4:]
    kv = model.prefill(prompt[:, :3]).unfreeze()
    model.generate(prompt[:, 3:], past_kv_cache=kv, do_sample=False, max_new_tokens=6, eos_token_id=end, verbose=False)
    # Row 0 ran its prompt and its first new token; its end token was never run.
    assert kv.previous_attention_mask.sum(1).tolist() == [5, 9]


def test_num_return_sequences_run_the_prompt_once_and_are_samples_of_their_own():
    model, _ = pair()
    widths = []
    run = type(model).run
    model.run = lambda ids, *args, **keywords: (widths.append(tuple(ids.shape)), run(model, ids, *args, **keywords))[1]
    try:
        tokens = model.generate(torch.tensor([[5, 17, 80]]), num_return_sequences=4, seed=3, verbose=False)
    finally:
        del model.run
    assert widths == [(1, 3)] + [(4, 1)] * 9
    assert tokens.shape == (4, 13)
    assert len({tuple(row) for row in tokens.tolist()}) == 4
    two = model.generate(torch.tensor([[5, 17, 80], [9, 9, 1]]), num_return_sequences=2, seed=3, verbose=False)
    assert two[:, :3].tolist() == [[5, 17, 80], [5, 17, 80], [9, 9, 1], [9, 9, 1]]
    assert two[:2].tolist() == tokens[:2].tolist()


def test_without_a_cache_the_same_tokens_are_drawn():
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80]])
    with_cache = model.generate(ids, seed=1, max_new_tokens=20, verbose=False)
    without = model.generate(ids, seed=1, max_new_tokens=20, use_past_kv_cache=False, verbose=False)
    assert with_cache.tolist() == without.tolist()


def test_foreign_caches_are_refused():
    model, _ = pair()
    ids = torch.tensor([[5]])
    other, _ = pair("llama-mqa")
    with pytest.raises(CacheError, match="another"):
        model.generate(ids, past_kv_cache=other.prefill(ids), verbose=False)
    with pytest.raises(CacheError, match="float64"):
        model.generate(ids, past_kv_cache=model.prefill(ids).to(dtype=torch.float64), verbose=False)
    with pytest.raises(CacheError, match="2 rows"):
        model.generate(ids, past_kv_cache=model.prefill(torch.tensor([[5], [6]])), verbose=False)


def test_work_per_token_stays_flat(monkeypatch):
    """Appending to the cache costs O(1) a token: each step runs one token, and buffers move as doubling moves them.

    Times are in `tests/benchmarks/test_generation.py`.
    """
    cfg = pair()[0].cfg.replace(n_ctx=512, origin=None)
    model, n_tokens = HookedCausalLM(cfg), 500
    moved, widths = [], []
    grow = HookedKeyValueCacheEntry._grow

    def count(past, capacity):
        moved.append(past.numel())
        return grow(past, capacity)

    monkeypatch.setattr(HookedKeyValueCacheEntry, "_grow", staticmethod(count))
    with unchecked(), model.add_hook("hook_embed", lambda tensor, hook: widths.append(tensor.shape[1])):
        for _ in model.generate_stream(torch.tensor([[5]]), max_new_tokens=n_tokens, do_sample=False):
            pass
    assert set(widths) == {1}
    assert len(widths) <= n_tokens
    in_the_end = 2 * cfg.n_layers * n_tokens * cfg.n_kv_heads * cfg.d_head
    # 1 + 2 + 4 + ... columns, each buffer moved once as it doubles: less than twice what is there in the end.
    assert 0 < sum(moved) < 2 * in_the_end
