"""Prompts become one batch, padded on the left."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.generation.options import GenerationOptions
from hooklens.generation.prompts import end_token_ids, filling_token_id, read_prompts
from tests.generation.networks import pair, reader, with_padding_id

ROW = st.lists(st.integers(1, 96), min_size=1, max_size=6)


@settings(deadline=None)
@given(rows=st.lists(st.tuples(ROW, st.booleans()), min_size=1, max_size=4))
def test_padding_on_either_side_becomes_padding_on_the_left(rows):
    width = max(len(ids) for ids, _ in rows)
    batch = [ids + [0] * (width - len(ids)) if right else [0] * (width - len(ids)) + ids for ids, right in rows]
    prompts = read_prompts(with_padding_id(pair()[0]), torch.tensor(batch), GenerationOptions())
    assert prompts.lengths == [len(ids) for ids, _ in rows]
    assert prompts.padding == [width - len(ids) for ids, _ in rows]
    for found, padding, (ids, _) in zip(prompts.ids.tolist(), prompts.padding, rows, strict=True):
        assert found[padding:] == ids
    if prompts.mask is None:
        assert set(prompts.padding) == {0}
    else:
        assert prompts.mask.sum(1).tolist() == prompts.lengths


def test_text_follows_the_bos_rule_and_goes_on_from_a_cache_without_bos():
    model = reader()
    bos = model.tokenizer.bos_token_id
    assert read_prompts(model, "Mary went", GenerationOptions()).ids[0, 0] == bos
    assert read_prompts(model, "Mary went", GenerationOptions(prepend_bos=False)).ids.shape == (1, 2)
    on_cache = read_prompts(model, "went to", GenerationOptions(past_kv_cache=model.prefill("Mary")))
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


def test_all_rows_that_are_too_long_are_counted():
    ids = torch.ones(3, 60, dtype=torch.long)
    with pytest.raises(InputError, match=r"row 0 has 60 prompt tokens.*n_ctx=64 \(and 2 more rows\)"):
        read_prompts(pair()[0], ids, GenerationOptions())
