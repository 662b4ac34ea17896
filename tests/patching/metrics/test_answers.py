import pytest
import torch

from hooklens.errors import InputError
from hooklens.patching.metrics.answers import ids_of_pairs, list_tokens
from tests.model.networks import make_model


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(3, [3]), (" a", [" a"]), ([1, " b"], [1, " b"]), (torch.tensor([4, 5]), [4, 5]), (torch.tensor(6), [6])],
)
def test_tokens_are_listed(tokens, expected):
    assert list_tokens(tokens) == expected


def test_each_pair_has_its_own_or_all_have_one():
    model = make_model("rotary")
    assert ids_of_pairs(model, [5, 6, 7], [2, 0], 3, "answer").tolist() == [7, 5]
    assert ids_of_pairs(model, 4, [2, 0], 3, "answer").tolist() == [4]
    with pytest.raises(InputError, match="answer: 2 tokens for 3 pairs; expected 1 or 3"):
        ids_of_pairs(model, [5, 6], [0], 3, "answer")
    with pytest.raises(InputError, match=r"wrong: token ids \[-1, 99\] are outside the vocabulary, 0 to 22"):
        ids_of_pairs(model, [-1, 99], [0, 1], 2, "wrong")
