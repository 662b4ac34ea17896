"""Parts of the network on a cache, failures that leave it as it was, and refusals."""

import pytest
import torch

from hooklens import HookedKeyValueCache
from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import CacheError, InputError
from tests.annotations import unchecked
from tests.cached_calls.networks import assert_close, build, draw_rows, read
from tests.model.networks import N_CTX, make_config, make_model, pad_rows, random_tokens


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
