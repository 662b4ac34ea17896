"""Tests of hooklens.kv_cache.ids: the token ids that a cache holds, against plain tensors."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hooklens import HookedKeyValueCache
from hooklens.errors import CacheError
from tests.annotations import unchecked
from tests.checkpoints import load_apart
from tests.kv_cache.test_cache import append_noise, fill
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
STEP = st.tuples(
    st.sampled_from(
        ["call", "call", "unknown", "roll back", "crop", "select", "expand", "clone", "to", "file", "copy"]
    ),
    st.integers(0, 50),
)


def run(cache: HookedKeyValueCache, n: int, seed: int) -> torch.Tensor:
    """A call of new tokens on a cache, and their ids."""
    ids = random_tokens(cache.batch_size, n, seed=seed)
    MODEL(ids, past_kv_cache=cache, return_type=None)
    return ids


@settings(max_examples=60)
@given(steps=st.lists(STEP, min_size=2, max_size=8), batch=st.sampled_from([1, 2]))
def test_ids_go_where_keys_and_values_go(steps, batch, tmp_path_factory):
    """Columns without ids (None) leave those behind them without, until they are rolled back."""
    cache = HookedKeyValueCache.init_cache(MODEL.cfg, batch_size=batch, dtype=MODEL.dtype)
    columns: list[torch.Tensor | None] = []
    for name, number in steps:
        n, rows = len(cache), cache.batch_size
        if name == "call":
            columns += run(cache, 1 + number % 3, number).unbind(1)
        elif name == "unknown":
            for entry in cache.entries:
                new = torch.randn(rows, 1, MODEL.cfg.n_kv_heads, MODEL.cfg.d_head, dtype=MODEL.dtype)
                entry.append(new, new)
            cache.append_attention_mask(torch.ones(rows, 1, dtype=torch.bool))
            columns.append(None)
        elif name == "roll back":
            kept = max(0, n - number % 4)
            cache.roll_back(kept)
            columns = columns[:kept]
        elif name == "crop":
            kept = max(0, n - number % 3)
            cache, columns = cache.crop(kept), columns[:kept]
        elif name in ("select", "expand"):
            if name == "expand" and rows > 1:
                continue
            index = [(number + i) % rows for i in range(number % 3 + 1)] if name == "select" else [0, 0]
            cache = cache.select(index) if name == "select" else cache.expand(2)
            columns = [None if column is None else column[index] for column in columns]
        elif name == "file" and n:
            path = tmp_path_factory.mktemp("cache") / "file"
            cache.save(path)
            known = cache.token_ids is not None
            cache = HookedKeyValueCache.load(path)
            columns = columns if known else [None] * n
        else:
            changes = {"clone": HookedKeyValueCache.clone, "copy": copy.copy}
            cache = changes[name](cache) if name in changes else cache.to("cpu", torch.float64)
        if None in columns:
            assert cache.token_ids is None
            with pytest.raises(
                CacheError, match=r"the cache does not know which tokens it holds.*cache.token_ids = ids"
            ):
                cache.token_rows()
        else:
            expected = torch.stack(columns, 1) if columns else torch.empty(cache.batch_size, 0, dtype=torch.long)
            assert torch.equal(cache.token_ids, expected)
            assert cache.token_rows() == expected.tolist()


def test_rows_leave_padding_out():
    ids, mask = torch.tensor([[0, 5, 6], [7, 8, 9]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    cache = MODEL.prefill(ids, attention_mask=mask)
    assert torch.equal(cache.token_ids, ids)
    assert cache.token_rows() == [[5, 6], [7, 8, 9]]
    ids[1, 0] = 3
    assert cache.token_rows()[1] == [7, 8, 9]


def test_a_residual_stream_has_no_ids_and_a_call_that_fails_leaves_none():
    cache = HookedKeyValueCache.init_cache(MODEL.cfg, dtype=MODEL.dtype)
    ids = run(cache, 3, 0)
    with pytest.raises(ZeroDivisionError):
        MODEL.run_with_hooks(ids, past_kv_cache=cache, fwd_hooks=[("hook_embed", lambda tensor, hook: 1 / 0)])
    assert torch.equal(cache.token_ids, ids)
    stream = torch.randn(1, 2, MODEL.cfg.d_model, dtype=MODEL.dtype)
    MODEL(stream, start_at_layer=0, past_kv_cache=cache, return_type=None)
    assert cache.token_ids is None
    cache.roll_back(3)
    assert torch.equal(cache.token_ids, ids)


def test_who_knows_the_tokens_may_say_so():
    cache = fill(2, frozen=True)
    assert cache.token_ids is None
    ids = torch.arange(10).view(2, 5)
    cache.token_ids = ids.int()
    assert torch.equal(cache.token_ids, ids)
    assert torch.equal(HookedKeyValueCache(cache.entries, cache.previous_attention_mask, token_ids=ids).token_ids, ids)
    for wrong, text in (
        (ids[:1], r"token_ids: found torch.int64 \[1, 5\]; expected integers \[2, 5\], one for each column"),
        (ids.float(), r"token_ids: found torch.float32 \[2, 5\]"),
        ([[1]], "token_ids: found a list"),
    ):
        with unchecked(), pytest.raises(CacheError, match=text):
            cache.token_ids = wrong
    assert torch.equal(cache.token_ids, ids)
    cache.token_ids = None
    assert cache.token_ids is None
    growing = fill(1).crop(0)
    append_noise(growing, 0)
    with unchecked(), pytest.raises(CacheError, match=r"token_ids: found torch.int64 \[1, 2\]"):
        growing.append_attention_mask(torch.ones(1, 1, dtype=torch.bool), token_ids=torch.zeros(1, 2, dtype=torch.long))


def test_files_without_ids_load_and_wrong_ids_are_refused(tmp_path):
    """Files were written without ids before caches remembered them."""
    path = tmp_path / "the file"
    cache = MODEL.prefill(random_tokens(2, 4))
    cache.save(path)
    assert torch.equal(HookedKeyValueCache.load(path).token_ids, cache.token_ids)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "digest"}
    # Apart from the file, which is written over.
    tensors = load_apart(path)
    ids = tensors.pop("token_ids")
    save_file(tensors, path, metadata=metadata)
    assert HookedKeyValueCache.load(path).token_ids is None
    for wrong in (ids[:, :3].contiguous(), ids.float(), -1 - ids):
        save_file({**tensors, "token_ids": wrong}, path, metadata=metadata)
        with unchecked(), pytest.raises(CacheError, match="the file: token_ids are"):
            HookedKeyValueCache.load(path)


def test_ids_lie_with_the_mask():
    cache = MODEL.prefill(random_tokens(1, 3)).to("meta")
    assert cache.token_ids.is_meta
