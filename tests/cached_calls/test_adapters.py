"""Key-value caches and adapters beside the weights: what was computed with some goes on with the same."""

import re

import pytest
import torch

from hooklens.errors import CacheError
from hooklens.kv_cache import HookedKeyValueCache
from tests.adapted_models import TOKENS, load, make_adapted

# float64 logits of some ten.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
PAST, REST = TOKENS[:, :5], TOKENS[:, 5:]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """With the adapters "one" and "other" beside its weights."""
    first = make_adapted("llama", tmp_path_factory.mktemp("cached"))
    second = make_adapted("llama", tmp_path_factory.mktemp("cached"), seed=5, target_modules=["v_proj", "down_proj"])
    made = load(first)
    made.add_adapter("other", second.adapter)
    return made


def told(cache, now):
    named = [" + ".join(names) or "none" for names in (cache, now)]
    return re.escape(f"the cache was filled with adapters {named[0]} acting, and those that act now are {named[1]}: ")


USES = {
    "a call": lambda model, kv: model(REST, past_kv_cache=kv),
    "a run with a cache": lambda model, kv: model.run_with_cache(REST, past_kv_cache=kv),
    "generation": lambda model, kv: model.generate(
        REST, past_kv_cache=kv, max_new_tokens=2, do_sample=False, verbose=False, return_type="tokens"
    ),
}
CHOICES = [(), ("one",), ("other",), ("one", "other"), ("other", "one")]


@pytest.mark.parametrize("use", USES)
def test_a_cache_goes_on_with_the_adapters_that_filled_it(model, use):
    """It went on with any: keys and values of one model, and queries of another, without a word."""
    for filled in CHOICES:
        model.set_adapter(filled)
        kv = model.prefill(PAST)
        assert kv.adapters == filled
        for now in CHOICES:
            model.set_adapter(now)
            if now == filled:
                USES[use](model, kv)
                continue
            with pytest.raises(CacheError, match=told(filled, now)):
                USES[use](model, kv)


def test_the_rest_is_as_in_one_call(model):
    for names in CHOICES:
        model.set_adapter(names)
        kv = model.prefill(PAST)
        torch.testing.assert_close(model(REST, past_kv_cache=kv), model(TOKENS)[:, 5:], **CLOSE)


def test_what_is_refused_would_be_wrong(model):
    model.set_adapter("one")
    kv = model.prefill(PAST)
    kv.adapters = ()
    model.set_adapter(None)
    found = model(REST, past_kv_cache=kv)
    assert float((found - model(TOKENS)[:, 5:]).abs().max()) > 0.1


def test_a_block_without_adapters_counts(model):
    model.set_adapter("one")
    with model.disable_adapter():
        kv = model.prefill(PAST)
        model(REST, past_kv_cache=kv)
    assert kv.adapters == ()
    with pytest.raises(CacheError, match=told((), ("one",))):
        model(REST, past_kv_cache=kv)


def test_an_empty_cache_takes_what_fills_it(model):
    model.set_adapter("other")
    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64)
    model.set_adapter(["one", "other"])
    model(PAST, past_kv_cache=kv)
    assert kv.adapters == ("one", "other")


def test_what_is_made_of_a_cache_keeps_the_record(model, tmp_path):
    model.set_adapter(["one", "other"])
    kv = model.prefill(PAST)
    kv.save(tmp_path / "kv.safetensors")
    made = [kv.clone(), kv.crop(3), kv.select([0]), kv.select([0]).expand(2), kv.to(dtype=torch.float32)]
    for one in (*made, HookedKeyValueCache.load(tmp_path / "kv.safetensors")):
        assert one.adapters == ("one", "other")


def test_a_model_without_adapters_reads_no_cache_of_one_with(model):
    model.set_adapter("one")
    kv = model.prefill(PAST)
    with pytest.raises(CacheError, match=told(("one",), ())):
        model.merge_adapter()(REST, past_kv_cache=kv)
