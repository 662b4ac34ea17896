"""Tokens of a model whose embedding has more rows than its tokenizer has tokens."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.analysis.circuits import read_ov_directions, top_ov_pairs
from hooklens.analysis.lens import logit_lens
from hooklens.analysis.reading.token_names import name_tokens
from hooklens.bundled.tokenizer import build_tokenizer
from tests.model.networks import make_config, make_model


@pytest.fixture(scope="module")
def model():
    tokenizer = build_tokenizer(n_ctx=64)
    weights = make_model(make_config(d_vocab=len(tokenizer) + 7))
    return HookedCausalLM.from_state_dict(dict(weights.named_weights()), weights.cfg, tokenizer)


def test_ids_without_text_stand_for_themselves(model):
    first = len(model.tokenizer)
    word = model.to_single_token("Mary")
    assert name_tokens(model, torch.tensor([word, first, first + 6])) == ("Mary", first, first + 6)


def test_ids_without_a_tokenizer():
    assert name_tokens(make_model("rotary"), torch.tensor([3, 1])) == (3, 1)


def test_tables_hold_rows_that_no_token_uses(model):
    """A padded row among the top tokens (Pythia has 50304 rows for 50277 tokens) was an error, and the table lost."""
    d_vocab, k = model.cfg.d_vocab, 30
    _, cache = model.run_with_cache("When Mary and John")
    everything = logit_lens(model, cache, k=d_vocab).top_tokens[0]
    assert set(everything) == set(name_tokens(model, torch.arange(d_vocab)))
    assert len(read_ov_directions(model, 0, 0, k=d_vocab).reads[0]) == d_vocab
    assert len(top_ov_pairs(model, 0, 0, k=k)) == k
