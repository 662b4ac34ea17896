"""Prompts become one batch, padded on the left."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hooklens import HookedCausalLM
from hooklens.errors import InputError
from hooklens.generation.options import GenerationOptions
from hooklens.generation.prompts import end_token_ids, filling_token_id, read_prompts
from tests.generation.networks import pair, reader, with_padding_id

ROW = st.lists(st.integers(1, 96), min_size=1, max_size=6)


PADDING = with_padding_id(pair()[0])


@given(rows=st.lists(st.tuples(ROW, st.booleans()), min_size=1, max_size=4))
def test_padding_on_either_side_becomes_padding_on_the_left(rows):
    width = max(len(ids) for ids, _ in rows)
    batch = [ids + [0] * (width - len(ids)) if right else [0] * (width - len(ids)) + ids for ids, right in rows]
    prompts = read_prompts(PADDING, torch.tensor(batch), GenerationOptions())
    assert prompts.lengths == [len(ids) for ids, _ in rows]
    assert prompts.padding == [width - len(ids) for ids, _ in rows]
    for found, padding, (ids, _) in zip(prompts.ids.tolist(), prompts.padding, rows, strict=True):
        assert found[padding:] == ids
    if prompts.mask is None:
        assert set(prompts.padding) == {0}
    else:
        assert prompts.mask.sum(1).tolist() == prompts.lengths


@pytest.mark.parametrize("form", [torch.tensor, np.array, list, tuple])
def test_ids_in_every_form(form):
    found = read_prompts(with_padding_id(pair()[0]), form([[0, 5], [6, 7]]), GenerationOptions())
    assert found.ids.tolist() == [[0, 5], [6, 7]]
    assert found.mask.tolist() == [[False, True], [True, True]]
    assert found.lengths == [1, 2]


def test_a_first_token_that_is_bos_and_eos_is_kept():
    """It was taken for padding and dropped."""
    model = with_padding_id(pair()[0])
    model.tokenizer.pad_token_id, model.tokenizer.bos_token_id, model.tokenizer.eos_token_id = None, 0, 0
    found = read_prompts(model, torch.tensor([[0, 5, 6], [9, 10, 11]]), GenerationOptions())
    assert found.ids.tolist() == [[0, 5, 6], [9, 10, 11]]
    assert found.mask is None


def test_a_filling_token_that_the_model_lacks_is_not_put_into_rows():
    model = with_padding_id(pair()[0])
    model.tokenizer.pad_token_id = model.cfg.d_vocab
    assert filling_token_id(model) == 0


def test_text_follows_the_bos_rule_and_goes_on_from_a_cache_without_bos():
    model = reader()
    bos = model.tokenizer.bos_token_id
    assert read_prompts(model, "Mary went", GenerationOptions()).ids[0, 0] == bos
    assert read_prompts(model, "Mary went", GenerationOptions(prepend_bos=False)).ids.shape == (1, 2)
    on_cache = read_prompts(model, " went to", GenerationOptions(past_kv_cache=model.prefill("Mary")))
    assert on_cache.ids.shape == (1, 2)
    assert on_cache.n_before == [2]


def test_one_row_of_ids_is_a_batch():
    assert read_prompts(pair()[0], torch.tensor([5, 6]), GenerationOptions()).ids.tolist() == [[5, 6]]


def test_end_and_filling_tokens_are_the_tokenizers():
    model = reader()
    assert end_token_ids(model, GenerationOptions()) == [model.tokenizer.eos_token_id]
    assert end_token_ids(model, GenerationOptions(eos_token_id=7)) == [7]
    assert end_token_ids(model, GenerationOptions(stop_at_eos=False)) == []
    assert end_token_ids(pair()[0], GenerationOptions()) == []
    assert filling_token_id(model) == model.tokenizer.pad_token_id
    assert filling_token_id(pair()[0]) == 0


def test_the_checkpoints_generation_config_comes_before_the_tokenizer(monkeypatch):
    model = reader()
    monkeypatch.setattr(model, "generation_config", {"eos_token_id": [5, 6], "pad_token_id": 7, "top_k": 3})
    assert end_token_ids(model, GenerationOptions()) == [5, 6]
    assert end_token_ids(model, GenerationOptions(eos_token_id=8)) == [8]
    assert end_token_ids(model, GenerationOptions(stop_at_eos=False)) == []
    assert filling_token_id(model) == 7
    model.generation_config = {"eos_token_id": 0, "pad_token_id": 10**6}
    assert end_token_ids(model, GenerationOptions()) == [0]
    assert filling_token_id(model) == model.tokenizer.pad_token_id


def test_all_rows_that_are_too_long_are_counted():
    ids = torch.ones(3, 60, dtype=torch.long)
    with pytest.raises(InputError, match=r"row 0 has 60 prompt tokens.*n_ctx=64 \(and 2 more rows\)"):
        read_prompts(pair()[0], ids, GenerationOptions())


def test_rows_may_fill_the_context_and_the_longest_that_does_not_fit_is_named():
    ids = torch.ones(2, 10, dtype=torch.long)
    assert read_prompts(pair()[0], ids, GenerationOptions(max_new_tokens=54)).lengths == [10, 10]
    padded = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 5, 6, 7]])
    model = with_padding_id(pair()[0])
    with pytest.raises(
        InputError, match=r"row 1 has 4 prompt tokens.* 65 positions in all, the model has n_ctx=64; ask"
    ):
        read_prompts(model, padded, GenerationOptions(max_new_tokens=61))
    with pytest.raises(InputError, match=r"row 1 has 4 prompt tokens.* 66 positions in all.* \(and 1 more rows\); ask"):
        read_prompts(model, padded, GenerationOptions(max_new_tokens=62))


@pytest.mark.parametrize("bos", ["<s>", None])
def test_an_empty_text_goes_on_from_the_token_that_opens_a_sequence(bos):
    """Also for a tokenizer that puts none before other text; one that has none has nothing to go on from."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    model = with_padding_id(pair()[0])
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=bos)
    assert read_prompts(model, "a", GenerationOptions()).ids.tolist() == [[1]]
    if bos is None:
        with pytest.raises(InputError, match="empty"):
            read_prompts(model, "", GenerationOptions())
    else:
        assert read_prompts(model, "", GenerationOptions()).ids.tolist() == [[0]]
        with pytest.raises(InputError, match="empty"):
            read_prompts(model, "", GenerationOptions(prepend_bos=False))


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_a_network_that_is_not_causal_generates_nothing(use_past_kv_cache):
    """What it gives at the last token would change with every new one."""
    causal, _ = pair()
    model = HookedCausalLM.from_state_dict(causal.state_dict(), causal.cfg.replace(causal=False, origin=None))
    options = {"use_past_kv_cache": use_past_kv_cache}
    for call in (
        lambda: model.generate(torch.tensor([[5, 6]]), verbose=False, **options),
        lambda: model.generate_stream(torch.tensor([[5, 6]]), **options),
    ):
        with pytest.raises(InputError, match=r"generate: this network is not causal \(cfg.causal=False\)"):
            call()
