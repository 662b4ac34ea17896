"""Model calls on a key-value cache equal calls without one: splits, padding, frozen prefixes, hooks, gradients.

Bounds: in float64 1e-10. In float32 1e-5, times the largest logit where that is above 1: the checkpoints of the
catalogue are random and wide, so logits of 10 and more occur, and a sum taken in another order is off by a share
of its size. `test_bound_is_what_transformers_own_cache_needs` shows that transformers needs the same.
"""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hooklens import HookedCausalLM, HookedKeyValueCache, edits
from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import CacheError, InputError
from tests.annotations import unchecked
from tests.checkpoints import build_variant
from tests.generation.networks import reader
from tests.model.networks import CONFIGS, N_CTX, Allocations, make_config, make_model, pad_rows, random_tokens

VARIANTS = ["neox-parallel", "llama-gqa", "falcon-7b", "falcon-40b", "falcon-rw", "falcon-alibi-parallel-mqa"]
N = 9


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


# A cache that is appended to


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


# A frozen prefix


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
@settings(deadline=None, max_examples=60)
@given(
    network=st.sampled_from(list(CONFIGS)),
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
@pytest.mark.parametrize("network", CONFIGS)
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
    model = make_model(CONFIGS[network].replace(n_ctx=512))
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


# Hooks, edits and gradients


@pytest.mark.parametrize("network", CONFIGS)
@pytest.mark.parametrize("rows_of_prefix", [1, 3])
@torch.no_grad()
def test_watching_a_call_on_a_frozen_prefix_changes_nothing(network, rows_of_prefix):
    """Every hook point fires once; logits are bit-identical; the pattern covers past + new."""
    model = build(network, torch.float32)
    prefix, suffixes = random_tokens(rows_of_prefix, 6), random_tokens(3, 2, seed=2)
    kv = model.prefill(prefix)
    plain = model(suffixes, past_kv_cache=kv)
    fired: list[str] = []
    logits, captured = model.run_with_cache(
        suffixes,
        past_kv_cache=kv,
        names_filter="*",
        fwd_hooks=[("*", lambda tensor, hook: fired.append(hook.name))],
    )
    assert torch.equal(logits, plain)
    assert sorted(fired) == sorted(model.hook_points())
    whole = torch.cat([prefix.expand(3, -1), suffixes], 1)
    _, expected = model.run_with_cache(whole, names_filter="*")
    for name in model.hook_points():
        found, full = captured[name], expected[name]
        if name.endswith(("pattern", "attn_scores")):
            assert found.shape[-2:] == (2, 8)
            full = full[:, :, 6:]
        else:
            full = full[:, 6:]
        finite = full.isfinite()
        assert torch.equal(found.isfinite(), finite)
        assert_close(found[finite], full[finite])


EDITS = [
    edits.Scale("blocks.0.hook_resid_pre", 1.5, pos=7),
    edits.Add("blocks.1.hook_resid_pre", 2.0, pos=-1),
    edits.Zero("blocks.1.attn.hook_z", head=1, pos=[6, 7]),
    edits.Zero("blocks.1.attn.hook_v", pos=slice(6, None)),
    edits.Zero("blocks.0.attn.hook_pattern", head=0, pos=7),
    edits.Scale("blocks.0.attn.hook_attn_scores", 0.5, pos=-2),
    edits.Scale("blocks.0.attn.hook_k", 3.0, pos=6),
]


@torch.no_grad()
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: f"{type(edit).__name__} {edit.name} {edit.pos}")
@pytest.mark.parametrize("network", ["grouped", "alibi", "capped"])
def test_edits_name_absolute_positions_on_a_cached_call(network, edit):
    model = build(network)
    prefix, suffixes = random_tokens(1, 6), random_tokens(3, 2, seed=2)
    whole = torch.cat([prefix.expand(3, -1), suffixes], 1)
    expected = model.run_with_hooks(whole, edits=[edit])[:, 6:]
    found = model.run_with_hooks(suffixes, past_kv_cache=model.prefill(prefix), edits=[edit])
    assert_close(found, expected)
    assert not torch.equal(found, model(suffixes, past_kv_cache=model.prefill(prefix)))


@torch.no_grad()
def test_edits_while_the_prefix_is_cached_are_in_the_cache():
    model = build("grouped")
    edit = edits.Scale("blocks.0.attn.hook_rot_k", 2.0, pos=3)
    prefix, suffixes = random_tokens(1, 6), random_tokens(3, 2, seed=2)
    with model.hooks(edits=[edit]):
        kv = model.prefill(prefix)
    expected = model.run_with_hooks(torch.cat([prefix.expand(3, -1), suffixes], 1), edits=[edit])[:, 6:]
    assert_close(model(suffixes, past_kv_cache=kv), expected)


@pytest.mark.parametrize("network", CONFIGS)
def test_gradients_through_suffixes_equal_the_full_runs(network):
    model = build(network)
    prefix, suffixes = random_tokens(1, 6), random_tokens(3, 2, seed=2)
    whole = torch.cat([prefix.expand(3, -1), suffixes], 1)
    gradients = []
    for tokens, kv in ((whole, None), (suffixes, model.prefill(prefix))):
        delta = torch.zeros(3, 2, model.cfg.d_model, dtype=torch.float64, requires_grad=True)

        def add(stream, hook, delta=delta):
            return torch.cat([stream[:, :-2], stream[:, -2:] + delta], 1)

        logits = model.run_with_hooks(tokens, past_kv_cache=kv, fwd_hooks=[("hook_embed", add)])
        logits[:, -2:].square().sum().backward()
        gradients.append(delta.grad)
    model.zero_grad()
    assert float(gradients[0].abs().max()) > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("network", ["rotary", "grouped", "alibi", "capped"])
def test_explicit_way_equals_the_kernels(network):
    """Where autograd records, attention over the two parts is computed without the fused kernel."""
    model = build(network)
    kv = model.prefill(random_tokens(1, 6))
    suffixes = random_tokens(3, 4, seed=2)
    with torch.no_grad():
        fused = model(suffixes, past_kv_cache=kv)
    explicit = model(suffixes, past_kv_cache=kv)
    assert explicit.requires_grad
    assert_close(explicit.detach(), fused)


# Parts of the network, failures and refusals


@torch.no_grad()
@pytest.mark.parametrize("network", ["rotary", "capped"])
def test_layers_and_positions_on_a_frozen_prefix(network):
    model = build(network)
    kv = model.prefill(random_tokens(1, 6))
    before = read(kv)
    suffixes, mask = pad_rows(draw_rows([4, 2, 3], seed=3), "left")
    keywords = {"past_kv_cache": kv, "attention_mask": mask}
    expected = model(suffixes, **keywords)
    stream = model(suffixes, stop_at_layer=1, **keywords)
    _, captured = model.run_with_cache(suffixes, names_filter="blocks.1.hook_resid_pre", **keywords)
    assert torch.equal(stream, captured["resid_pre", 1])
    assert_close(model(stream, start_at_layer=1, **keywords), expected)
    last = model(suffixes, logits_at=-1, **keywords)
    assert_close(last, expected[:, -1:])
    first = model(suffixes, logits_at=0, **keywords)
    assert_close(first, torch.stack([expected[0, :1], expected[1, 2:3], expected[2, 1:2]]))
    assert all(torch.equal(a, b) for a, b in zip(read(kv), before, strict=True))


@torch.no_grad()
def test_part_of_the_layers_is_refused_on_a_cache_that_grows():
    model = build("rotary")
    kv = HookedKeyValueCache.init_cache(model.cfg, dtype=torch.float64)
    stream = model(random_tokens(1, 3), stop_at_layer=1)
    text = "in those layers only; freeze the cache"
    with pytest.raises(CacheError, match="running blocks 0 to 1 of 2 would append to the cache " + text):
        model(random_tokens(1, 3), stop_at_layer=1, past_kv_cache=kv)
    with pytest.raises(CacheError, match="running blocks 1 to 2 of 2 would append to the cache " + text):
        model(stream, start_at_layer=1, past_kv_cache=kv)
    model(random_tokens(1, 3), logits_at=-1, past_kv_cache=kv)
    assert len(kv) == 3


class BrokenHookError(Exception):
    """What a hook of the next test raises."""


@torch.no_grad()
@pytest.mark.parametrize("name", ["hook_embed", "blocks.0.hook_resid_post", "blocks.1.attn.hook_z", "unembed.hook_out"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("error", [BrokenHookError, KeyboardInterrupt])
def test_exception_in_a_hook_leaves_the_cache_as_it_was(name, frozen, error):
    model = build("rotary")
    kv = model.prefill(random_tokens(2, 5))
    if not frozen:
        kv.unfreeze()
    before = read(kv)
    suffixes = random_tokens(2, 3, seed=2)
    expected = model(suffixes, past_kv_cache=kv.clone())

    def fail(tensor, hook):
        raise error

    with pytest.raises(error):
        model.run_with_hooks(suffixes, past_kv_cache=kv, fwd_hooks=[(name, fail)])
    assert all(torch.equal(a, b) for a, b in zip(read(kv), before, strict=True))
    kv.check_consistent()
    assert_close(model(suffixes, past_kv_cache=kv), expected)


@torch.no_grad()
def test_lengths_that_change_the_frequencies_are_refused():
    """Dynamic rotary scaling turns all keys by the sequence's length; cached ones were turned by a shorter one's."""
    scaling = RotaryScaling(kind="dynamic", factor=4.0, original_n_ctx=8)
    model = make_model(make_config(positions=RotaryPositions(dim=6, scaling=scaling)))
    tokens = random_tokens(1, 10)
    kv = model.prefill(tokens[:, :5])
    assert_close(model(tokens[:, 5:8], past_kv_cache=kv), model(tokens[:, :8])[:, 5:])
    before = read(kv.unfreeze())
    with pytest.raises(CacheError, match="the 5 cached keys do not fit a sequence of 10; run the whole sequence with"):
        model(tokens[:, 5:], past_kv_cache=kv)
    assert all(torch.equal(a, b) for a, b in zip(read(kv), before, strict=True))


def test_bad_calls_on_a_cache_are_refused():
    model = build("rotary")
    kv = model.prefill(random_tokens(1, 6))
    suffixes = random_tokens(3, 2)
    with pytest.raises(InputError, match=r"\[3, 8\]; expected \[3, 2\]; it covers the new tokens only, not the 6 in"):
        model(suffixes, attention_mask=torch.ones(3, 8), past_kv_cache=kv)
    full = model.prefill(random_tokens(1, N_CTX))
    with pytest.raises(
        InputError, match=rf"needs {N_CTX + 1} positions \({N_CTX} of them in the cache\).*n_ctx={N_CTX}"
    ):
        model(suffixes[:, :1], past_kv_cache=full)
    kv.entries[1].frozen = False
    with pytest.raises(CacheError, match=r"entries of layers \[1\] are not frozen and the rest of the cache is frozen"):
        model(suffixes, past_kv_cache=kv)
    with (
        unchecked(),
        pytest.raises(TypeError, match=r"unexpected keyword 'past_kv_cach'. Did you mean 'past_kv_cache'"),
    ):
        model.run_with_cache(suffixes, past_kv_cach=kv)
