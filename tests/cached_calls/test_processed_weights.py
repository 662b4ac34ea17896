"""Key-value caches and weight processing: a cache goes with the weights that filled it, and says so."""

import pytest
import torch

from hooklens import HookedCausalLM, HookedKeyValueCache
from hooklens.errors import CacheError
from tests.cached_calls.networks import assert_close, load, read
from tests.model.networks import make_model, random_tokens

TOKENS = random_tokens(2, 9)
REFUSAL = (
    r"the cache was filled by a model with weight processing {}, the weight processing of this model is {}: .*"
    r"Make a cache with this model's model.prefill\(prefix\), or call the model that filled it"
)


@pytest.fixture(scope="module")
def model() -> HookedCausalLM:
    return load("neox-parallel")


@pytest.fixture(scope="module")
def folded(model) -> HookedCausalLM:
    processed = model.process_weights(fold_value_biases=True)
    # The config alone does not tell the two apart.
    assert processed.cfg.fingerprint == model.cfg.fingerprint
    return processed


def call(model, kv):
    return model(TOKENS[:, 5:], past_kv_cache=kv)


def run_with_cache(model, kv):
    return model.run_with_cache(TOKENS[:, 5:], past_kv_cache=kv, names_filter="z")


def generate(model, kv):
    return model.generate(TOKENS[:, 5:], past_kv_cache=kv, max_new_tokens=2, verbose=False)


@pytest.mark.parametrize("use", [call, run_with_cache, generate])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_cache_of_other_weights_is_refused_before_the_forward(model, folded, use, frozen):
    """A folded model took the unfolded one's cache, whose config is equal: its logits were wrong by 0.88."""
    for one, other, records in (
        (model, folded, ("none", "fold_value_biases")),
        (folded, model, ("fold_value_biases", "none")),
    ):
        kv = one.prefill(TOKENS[:, :5])
        kv = kv if frozen else kv.unfreeze()
        before, ran = read(kv), []
        with (
            other.hooks([("hook_embed", lambda tensor, hook, ran=ran: ran.append(hook.name))]),
            pytest.raises(CacheError, match=REFUSAL.format(*records)),
        ):
            use(other, kv)
        assert ran == []
        assert all(torch.equal(a, b) for a, b in zip(read(kv), before, strict=True))
        assert_close(one(TOKENS[:, 5:], past_kv_cache=kv), one(TOKENS)[:, 5:])


def test_what_is_refused_would_be_wrong(model, folded):
    """The two models agree on whole sequences, and not on each other's keys and values."""
    kv = model.prefill(TOKENS[:, :5])
    kv.transforms = folded.transforms
    assert_close(folded(TOKENS), model(TOKENS))
    with torch.no_grad():
        assert float((call(folded, kv) - model(TOKENS)[:, 5:]).abs().max()) > 0.1


def test_processing_that_changes_the_config_is_named_as_such(model):
    """The text was of another configuration where weight processing had brought a bias into being."""
    processed = model.process_weights(fold_ln=True, fold_value_biases=True)
    assert processed.cfg.fingerprint != model.cfg.fingerprint
    with pytest.raises(CacheError, match=REFUSAL.format(r"fold_ln \+ fold_value_biases", "none")):
        call(model, processed.prefill(TOKENS[:, :5]))


def test_an_empty_cache_takes_the_record_of_the_model_that_fills_it(model, folded):
    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64)
    folded(TOKENS[:, :5], past_kv_cache=kv)
    assert kv.transforms == folded.transforms
    with pytest.raises(CacheError, match=REFUSAL.format("fold_value_biases", "none")):
        call(model, kv)
    assert_close(call(folded, kv), folded(TOKENS)[:, 5:])
    assert model.prefill(TOKENS).transforms == ()
    assert folded.prefill(TOKENS).transforms == folded.transforms


def test_a_first_call_that_fails_leaves_the_cache_to_any_model(model, folded):
    def fail(tensor, hook):
        raise RuntimeError("half-way")

    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64)
    for where in ("blocks.1.hook_resid_pre", "unembed.hook_out"):
        with pytest.raises(RuntimeError, match="half-way"):
            folded.run_with_hooks(TOKENS, fwd_hooks=[(where, fail)], past_kv_cache=kv)
        assert len(kv) == 0
    assert_close(model(TOKENS, past_kv_cache=kv), model(TOKENS))
    assert kv.transforms == ()


def test_an_empty_frozen_cache_stays_open_to_both(model, folded):
    kv = HookedKeyValueCache.init_cache(model.cfg, batch_size=2, dtype=torch.float64).freeze()
    for one in (folded, model):
        assert_close(one(TOKENS, past_kv_cache=kv), model(TOKENS))


def test_a_cache_read_from_a_file_is_refused_too(model, folded, tmp_path):
    folded.prefill(TOKENS[:, :5]).save(tmp_path / "prefix")
    kv = HookedKeyValueCache.load(tmp_path / "prefix")
    assert_close(call(folded, kv), folded(TOKENS)[:, 5:])
    with pytest.raises(CacheError, match=REFUSAL.format("fold_value_biases", "none")):
        call(model, kv)


def test_other_steps_in_the_record_are_refused():
    """Equal records is the rule, also where the steps that differ leave keys and values as they are."""
    model = make_model("grouped")
    kv = model.process_weights(fold_ln=True).prefill(TOKENS[:, :5])
    with pytest.raises(CacheError, match=REFUSAL.format("fold_ln", "fold_ln \\+ center_unembed")):
        call(model.process_weights(fold_ln=True, center_unembed=True), kv)
