"""A frozen prefix: reuse, ragged suffixes, memory, and what prefill gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens import HookedKeyValueCache
from hooklens.config import RotaryPositions
from hooklens.errors import InputError
from tests.cached_calls.networks import VARIANTS, assert_close, build, draw_rows, load, read
from tests.generation.networks import reader
from tests.model.networks import ALL_CONFIGS, Allocations, make_config, make_model, pad_rows, random_tokens


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_prefix_serves_many_suffixes(variant):
    model = load(variant)
    prefix, suffixes = random_tokens(1, 7), random_tokens(5, 3, seed=2)
    expected = model(torch.cat([prefix.expand(5, -1), suffixes], 1))[:, 7:]
    assert_close(model(suffixes, past_kv_cache=model.prefill(prefix)), expected)
    assert_close(model(suffixes, past_kv_cache=model.prefill(prefix.expand(5, -1))), expected)
    assert_close(model(suffixes, past_kv_cache=model.prefill(prefix).expand(5)), expected)
    assert_close(model(suffixes, past_kv_cache=model.prefill(prefix).expand(5).unfreeze()), expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["neox-parallel", "llama-gqa", "falcon-rw"])
def test_a_hundred_reuses_are_bit_identical(variant):
    model = load(variant, torch.float32)
    kv = model.prefill(random_tokens(1, 7))
    before = read(kv)
    suffixes = random_tokens(3, 2, seed=2)
    first = model(suffixes, past_kv_cache=kv)
    for i in range(100):
        if i % 10 == 0:
            model(random_tokens(1 + i % 3, 4, seed=i), past_kv_cache=kv)
        assert torch.equal(model(suffixes, past_kv_cache=kv), first)
    assert all(torch.equal(a, b) for a, b in zip(read(kv), before, strict=True))
    assert len(kv) == 7


@torch.no_grad()
@settings(max_examples=60)
@given(
    network=st.sampled_from(list(ALL_CONFIGS)),
    prefix_lengths=st.lists(st.integers(1, 7), min_size=1, max_size=1)
    | st.lists(st.integers(1, 7), min_size=3, max_size=3),
    suffix_lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    extra_padding=st.integers(0, 2),
    prefix_side=st.sampled_from(["left", "right"]),
    suffix_side=st.sampled_from(["left", "right"]),
)
def test_ragged_suffixes_on_every_network(
    network, prefix_lengths, suffix_lengths, extra_padding, prefix_side, suffix_side
):
    """Windows, soft caps, ALiBi and every padding, each row against the whole sequence alone."""
    model = build(network)
    prefixes, suffixes = draw_rows(prefix_lengths, seed=1), draw_rows(suffix_lengths, seed=9)
    prefix_ids, prefix_mask = pad_rows(prefixes, prefix_side)
    prefix_ids = torch.nn.functional.pad(prefix_ids, (extra_padding, 0))
    prefix_mask = torch.nn.functional.pad(prefix_mask, (extra_padding, 0))
    suffix_ids, suffix_mask = pad_rows(suffixes, suffix_side)
    kv = model.prefill(prefix_ids, attention_mask=prefix_mask)
    logits = model(suffix_ids, attention_mask=suffix_mask, past_kv_cache=kv)
    for i, suffix in enumerate(suffixes):
        prefix = prefixes[i % len(prefixes)]
        alone = model(torch.cat([prefix, suffix])[None])
        assert_close(logits[i][suffix_mask[i].bool()], alone[0, len(prefix) :])


@torch.no_grad()
@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_empty_frozen_cache_is_no_cache(network):
    """Attention soft caps were left out on a frozen cache without columns."""
    model = build(network)
    tokens = random_tokens(2, 5)
    kv = HookedKeyValueCache.init_cache(model.cfg, dtype=torch.float64).freeze()
    assert_close(model(tokens, past_kv_cache=kv), model(tokens))
    assert len(kv) == 0


@torch.no_grad()
@pytest.mark.parametrize("network", ["rotary", "grouped", "alibi", "alibi, grouped", "capped"])
@pytest.mark.parametrize("padded", [False, True])
def test_no_tensor_as_large_as_rows_times_prefix(network, padded):
    """Nothing that a call on a shared prefix allocates has a key (or value) per row and prefix token."""
    model = make_model(ALL_CONFIGS[network].replace(n_ctx=512))
    n_rows, n_prefix = 40, 400
    suffixes = random_tokens(n_rows, 2, seed=2)
    mask = torch.ones_like(suffixes)
    if padded:
        mask[::2, 0] = 0
    prefix_mask = torch.ones(1, n_prefix)
    if padded:
        prefix_mask[0, :3] = 0
    kv = model.prefill(random_tokens(1, n_prefix), attention_mask=prefix_mask)
    with Allocations() as copied:
        model(suffixes, attention_mask=mask, past_kv_cache=kv.expand(n_rows).unfreeze())
    size = n_rows * n_prefix * model.cfg.n_kv_heads * model.cfg.d_head
    assert max(torch.Size(shape).numel() for _, shape in copied.sizes) >= size
    with Allocations() as allocated:
        model(suffixes, attention_mask=mask, past_kv_cache=kv)
    # A soft cap goes the explicit way: scores for every query and head, still no keys per row.
    largest = n_rows * n_prefix * 2 * model.cfg.n_heads if model.cfg.attn_softcap else n_rows * n_prefix * 2
    names = [size for size in allocated.sizes if torch.Size(size[1]).numel() > largest]
    assert names == []
    assert largest < size


@torch.no_grad()
def test_memory_without_masks_does_not_depend_on_rows_times_prefix():
    """With 16 times the prefix the largest tensor of a call on it stays what it is."""
    model = make_model(make_config(positions=RotaryPositions(dim=6), n_ctx=2048))
    suffixes = random_tokens(32, 2, seed=2)
    largest = []
    for n_prefix in (64, 1024):
        kv = model.prefill(random_tokens(1, n_prefix))
        # The first call makes the rotary tables for all positions.
        model(suffixes, past_kv_cache=kv)
        with Allocations() as allocated:
            model(suffixes, past_kv_cache=kv)
        largest.append(max(torch.Size(shape).numel() for _, shape in allocated.sizes))
    assert largest[0] == largest[1]


@torch.no_grad()
def test_prefix_cached_under_inference_mode_serves_gradients():
    """Its tensors could not be saved for a backward pass."""
    model = build("grouped")
    with torch.inference_mode():
        kv = model.prefill(random_tokens(1, 4))
    with torch.enable_grad():
        loss = model(random_tokens(2, 3), past_kv_cache=kv, return_type="loss")
        loss.backward()
    assert bool(model.blocks[0].attn.W_K.grad.abs().sum() > 0)
    model.zero_grad()
    kv.unfreeze()
    model(random_tokens(1, 3), past_kv_cache=kv)
    assert len(kv) == 7


def test_prefill_keeps_no_graph_and_gives_the_last_logits():
    model = build("grouped")
    ids, mask = pad_rows(draw_rows([5, 3], seed=1), "right")
    kv = model.prefill(ids, attention_mask=mask)
    assert kv.frozen
    assert not any(tensor.requires_grad for tensor in [*read(kv), kv.last_logits])
    logits = model(ids, attention_mask=mask)
    assert_close(kv.last_logits, torch.stack([logits[0, 4], logits[1, 2]]).detach())
    with pytest.raises(InputError, match=r"prefill sets \['logits_at', 'past_kv_cache'\] itself: leave them out"):
        model.prefill(ids, past_kv_cache=kv, logits_at=-1)


@torch.no_grad()
def test_text_goes_on_without_a_second_bos():
    model = reader()
    kv = model.prefill("When Mary and John went to the store ,")
    whole = model("When Mary and John went to the store , John gave")
    assert_close(model(" John gave", past_kv_cache=kv)[0], whole[0, len(kv) :])
