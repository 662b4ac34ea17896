"""End tokens, criteria of the caller's, and what they are shown."""

import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList

from hooklens.errors import InputError
from hooklens.generation.choosing.stopping import StopRules
from hooklens.generation.options import GenerationOptions
from hooklens.generation.prompts import read_prompts
from tests.generation.networks import RAGGED, left_pad, pair, with_padding_id

GREEDY = {"do_sample": False, "return_type": "output", "verbose": False}


def test_any_of_several_end_tokens_ends_a_row():
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80]])
    new = model.generate(ids, **GREEDY).new_tokens[0].tolist()
    first = min(new.index(new[3]), new.index(new[6]))
    out = model.generate(ids, eos_token_id=[new[6], new[3]], **GREEDY)
    assert out.new_tokens[0].tolist() == new[: first + 1]


def test_criteria_of_transformers_end_each_row_by_its_own_length():
    model, _ = pair()
    out = with_padding_id(model).generate(
        left_pad(RAGGED)[0], stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(8)]), **GREEDY
    )
    assert out.n_new_tokens == [8 - len(prompt) for prompt in RAGGED]
    assert out.finish_reasons == ["criterion"] * 3


def test_criteria_may_answer_for_all_rows_at_once_and_see_the_newest_token():
    model, _ = pair()
    seen = []

    def third(ids, scores):
        seen.append((ids.shape, scores.shape, bool((ids[:, -1] == scores.argmax(-1)).all())))
        return len(seen) == 3

    out = model.generate(torch.tensor([[5, 17], [9, 9]]), stopping_criteria=[third], **GREEDY)
    assert out.n_new_tokens == [3, 3]
    assert seen == [((2, 2 + n), (2, 97), True) for n in (1, 2, 3)]


def test_no_tokenizer_and_no_end_token_is_no_error():
    model, _ = pair()
    assert model.generate(torch.tensor([[5]]), **GREEDY).finish_reasons == ["length"]


def test_what_cannot_end_a_row_is_refused():
    model, _ = pair()
    prompts = read_prompts(model, [5], GenerationOptions())
    with pytest.raises(InputError, match=r"eos_token_id holds \[97, -1\], outside the vocabulary; ids are 0 to 96"):
        StopRules(model, GenerationOptions(eos_token_id=[3, 97, -1]), prompts)
    with pytest.raises(InputError, match="stop_strings needs a tokenizer"):
        StopRules(model, GenerationOptions(stop_strings="x"), prompts)
