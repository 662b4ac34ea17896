"""A prompt or the cache of its run: the same tables, bit for bit."""

import pandas as pd
import pytest
import torch

from hooklens.activation_cache.missing import MissingActivationError
from hooklens.analysis import attribution, heads, lens, sources
from hooklens.errors import CacheError, InputError
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens
from tests.word_models import make_word_model


@pytest.fixture(autouse=True)
def _without_gradients():
    """As functions of analysis run a prompt: with gradients torch takes kernels that round differently."""
    with torch.no_grad():
        yield


TEXTS = ["Mary gave a book to John", "the red cat"]
WORDS = make_word_model(d_model=16, n_ctx=32, init_std=0.3)
FUNCTIONS = {
    "components": lambda model, run: attribution.attribute_to_components(model, run, 3, 5),
    "heads": lambda model, run: attribution.attribute_to_heads(model, run, 3),
    "neurons": lambda model, run: attribution.attribute_to_neurons(model, run, 3, 5, k=4),
    "sources": lambda model, run: sources.attribute_to_sources(model, run, 3),
    "lens": lambda model, run: lens.logit_lens(model, run, k=2, pos_slice=None),
    "streams": lambda model, run: pd.concat(
        pd.DataFrame(one.logprobs.detach().flatten(0, 1).numpy()).assign(stream=one.stream)
        for one in lens.read_streams(model, run)
    ),
    "detect": lambda model, run: heads.detect_heads(model, run, "previous_token"),
    "detect by product": lambda model, run: heads.detect_heads(
        model, run, "previous_token", measure="mul", exclude_bos=True
    ),
    "scores": heads.head_scores,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_text_ids_and_cache_give_the_same_table(name):
    """Functions that take a cache refused text and ids, and those that take text refused a cache."""
    texts = ["Mary gave the book to Mary gave the", "the red cat saw the red cat saw"] if name == "scores" else TEXTS
    ids, mask = WORDS.to_tokens(texts, return_attention_mask=True)
    _, cache = WORDS.run_with_cache(ids, attention_mask=mask)
    tables = [FUNCTIONS[name](WORDS, run) for run in (texts, cache)]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    alone = WORDS.to_tokens(texts[0])
    tables = [FUNCTIONS[name](WORDS, run) for run in (texts[0], alone, WORDS.run_with_cache(alone)[1])]
    pd.testing.assert_frame_equal(tables[0], tables[1], check_exact=True)
    pd.testing.assert_frame_equal(tables[0], tables[2], check_exact=True)


@pytest.mark.parametrize("variant", ["bare", "grouped", "learned, tied", "rotary"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_captured_of_a_prompt_is_enough_in_other_networks(name, variant):
    model = make_model(variant)
    ids = random_tokens(2, 6).repeat(1, 2)[:, :8]
    tables = [FUNCTIONS[name](model, run) for run in (ids, model.run_with_cache(ids)[1])]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_sublayers_of_a_prompt():
    tables = [lens.logit_lens(WORDS, run, sublayers=True) for run in (TEXTS[0], WORDS.run_with_cache(TEXTS[0])[1])]
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert "0_mid" in set(tables[0].stream)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_cache_of_another_model_or_without_what_is_read(name):
    ids = WORDS.to_tokens("the red cat saw the red cat saw")
    _, other = make_word_model(d_model=8, n_ctx=32, init_std=0.3).run_with_cache(ids)
    with pytest.raises(CacheError, match="the cache is of another model: d_model is 8 in the cache and 16 in the"):
        FUNCTIONS[name](WORDS, other)
    _, little = WORDS.run_with_cache(ids, names_filter="hook_embed")
    with pytest.raises(MissingActivationError, match=r"blocks\.\d\.|ln_final"):
        FUNCTIONS[name](WORDS, little)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_no_run(name):
    for wrong in (3.5, object(), torch.zeros(2, 3, 16)):
        with unchecked(), pytest.raises(InputError):
            FUNCTIONS[name](WORDS, wrong)


def test_patterns_that_are_not_whole():
    ids = WORDS.to_tokens("the red cat saw the red cat saw")
    _, cut = WORDS.run_with_cache(ids, pos_slice=slice(0, 2))
    with pytest.raises(InputError, match="capture all positions"):
        heads.detect_heads(WORDS, cut, "previous_token")
    _, cache = WORDS.run_with_cache(ids)
    with pytest.raises(InputError, match="a cache knows the padding of its run"):
        heads.detect_heads(WORDS, cache, "previous_token", attention_mask=torch.ones_like(ids))
    same = heads.detect_heads(WORDS, cache.remove_batch_dim(), "previous_token")
    pd.testing.assert_frame_equal(same, heads.detect_heads(WORDS, cache, "previous_token"), check_exact=True)
