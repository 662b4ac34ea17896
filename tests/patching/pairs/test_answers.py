import numpy as np
import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching import MetricError
from hooklens.patching.pairs.answers import Answers, encode_answers, ids_as_given, list_answers
from tests.annotations import unchecked
from tests.model.networks import make_model


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (3, ((3,),)),
        (" a", ((" a",),)),
        (np.int64(3), ((3,),)),
        (torch.tensor(6), ((6,),)),
        ([1, " b"], ((1,), (" b",))),
        ((1, np.int32(2)), ((1,), (2,))),
        (torch.tensor([4, 5]), ((4,), (5,))),
        (np.array([4, 5]), ((4,), (5,))),
        (range(2), ((0,), (1,))),
        ([[1, 2]], ((1, 2),)),
        ([[1, " b"], 3, torch.tensor([4, 5, 6])], ((1, " b"), (3,), (4, 5, 6))),
        (torch.tensor([[1, 2], [3, 4], [5, 6]]), ((1, 2), (3, 4), (5, 6))),
    ],
)
def test_tokens_are_rows_of_answers(tokens, expected):
    """A tensor [3, 2] was flattened to six answers, and fitted six pairs."""
    with unchecked():
        assert list_answers(tokens, what="answer") == expected


@pytest.mark.parametrize(
    ("tokens", "match"),
    [
        (True, "answer is True"),
        (2.0, r"answer is 2\.0"),
        ([1, False], r"entries \[1\] are no tokens"),
        ([[1], [2.5], []], r"entries \[1, 2\] are no tokens"),
        ([], r"answer is \[\]"),
        (None, "answer is None"),
        ({1, 2}, "answer is {1, 2}"),
        (torch.ones(2, 2, 2, dtype=torch.long), r"a tensor \[2, 2, 2\]"),
        (torch.ones(2), "are no tokens"),
        (torch.ones(2, dtype=torch.bool), "are no tokens"),
        (torch.ones(2, dtype=torch.long, device="meta"), r"a tensor \[2\]"),
        ([[1, 2], [3, 3]], r"rows \[1\] name a token twice"),
    ],
)
def test_what_is_no_answer_is_refused(tokens, match):
    with unchecked(), pytest.raises(InputError, match=match):
        list_answers(tokens, what="answer")


def test_each_pair_has_its_own_or_all_have_the_same():
    model = make_model("rotary")
    of = encode_answers(model, [5, 6, 7], what="answer").of_pairs([2, 0], 3, what="answer")
    assert of.ids.tolist() == [[7], [5]]
    assert encode_answers(model, 4, what="answer").of_pairs([2, 0], 3, what="answer").ids.tolist() == [[4]]
    ragged = encode_answers(model, [[5, 6], [7], 8], what="answer")
    assert ragged.ids.tolist() == [[5, 6], [7, 7], [8, 8]]
    assert ragged.real.tolist() == [[True, True], [True, False], [True, False]]
    assert ragged.of_pairs([1], 3, what="answer").real.tolist() == [[True, False]]
    with pytest.raises(InputError, match="answer: 2 tokens for 3 pairs; expected 1 or 3"):
        encode_answers(model, [5, 6], what="answer").of_pairs([0], 3, what="answer")
    with pytest.raises(InputError, match="the pairs come from a loader, so their number is not known"):
        ragged.of_pairs([0], None, what="answer")
    with pytest.raises(InputError, match=r"wrong: token ids \[-1, 99\] are outside the vocabulary, 0 to 22"):
        encode_answers(model, [[-1, 99]], what="wrong")


def test_texts_are_encoded_and_may_not_meet():
    model = HookedCausalLM.from_pretrained("bundled:tiny-gpt-neox")
    mary, john = model.to_single_token(" Mary"), model.to_single_token(" John")
    assert encode_answers(model, [[" Mary", john]], what="answer").ids.tolist() == [[mary, john]]
    with pytest.raises(InputError, match=r"rows \[0\] name a token twice"):
        encode_answers(model, [[" Mary", mary]], what="answer")
    with pytest.raises(MetricError, match=r"LogProb: ' Mary' is text.*call metric\.encode\(model\) first"):
        ids_as_given([[3, " Mary"]], what="LogProb: answer")


def test_answers_are_read_where_they_fit():
    logits = torch.arange(24.0).reshape(1, 2, 2, 6)
    answers = Answers.of_ids([[1, 2], [5]])
    assert answers.read(logits, what="a").tolist() == [[[[1, 2], [7, 8]], [[17, 17], [23, 23]]]]
    assert answers.hold(torch.tensor([[[2, 3], [5, 1]]])).tolist() == [[[True, False], [True, False]]]
    with pytest.raises(MetricError, match="a: 2 tokens for 1 rows of logits; expected 1 or one for each"):
        answers.read(logits[:, :1], what="a")
    with pytest.raises(MetricError, match=r"a: token ids \[5\] are outside the vocabulary, 0 to 4"):
        answers.read(logits[..., :5], what="a")
