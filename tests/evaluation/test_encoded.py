"""Tests of hooklens.evaluation.encoded: items as token ids, all faults found before anything runs."""

import torch

from hooklens.evaluation import ContinuationItem, MultipleChoiceItem
from hooklens.evaluation.encoded import EncodedItem, encode_items
from hooklens.evaluation.prefix import Prefix, make_prefix
from tests.evaluation.networks import N_CTX, PREFIX, reader

GIVEN = {
    "text": ContinuationItem(id="a", continuation=" John gave"),
    "ids": ContinuationItem(id="b", continuation=(5, 6, 7)),
    "asked": MultipleChoiceItem(id="c", question=" John", choices=(" gave a", (5,)), answer=1),
}


def test_ids_are_those_of_the_texts():
    model = reader()
    prefix = make_prefix(model, PREFIX)
    encoded, faults = encode_items(model, GIVEN, prefix)
    assert faults == {}
    john, gave, a = model.to_tokens(" John gave a", prepend_bos=False)[0].tolist()
    assert {key: one.rows for key, one in encoded.items()} == {
        "text": [[john, gave]],
        "ids": [[5, 6, 7]],
        "asked": [[gave, a], [5]],
    }
    assert encoded["text"].start is None
    assert encoded["asked"].start.tokens.tolist() == [[*prefix.tokens[0].tolist(), john]]
    assert all(one.item is GIVEN[key] for key, one in encoded.items())
    alone, _ = encode_items(model, {"asked": GIVEN["asked"]}, None)
    assert torch.equal(alone["asked"].start.tokens, model.to_tokens(" John"))
    bare, _ = encode_items(model, {"asked": GIVEN["asked"]}, None, prepend_bos=False)
    assert bare["asked"].start.tokens.tolist() == [[john]]


def test_items_fit_to_the_last_token_and_not_beyond():
    """What was too long was found when its turn came."""
    model = reader()
    prefix = make_prefix(model, PREFIX)
    room = N_CTX - len(prefix)

    def try_lengths(question: int, choice: int) -> str:
        items = {
            "continuation": ContinuationItem(id="a", continuation=(4,) * (question + choice)),
            "asked": MultipleChoiceItem(id="b", question=(4,) * question, choices=((4,), (5,) * choice)),
        }
        _, faults = encode_items(model, items, prefix)
        assert list(faults) in ([], list(items))
        return " ".join(faults.values())

    assert try_lengths(3, room - 3) == ""
    found = try_lengths(3, room - 2)
    assert f"continuations 0 ({room + 1} tokens) do not fit behind a prefix of {len(prefix)} tokens" in found
    assert f"continuations 1 ({room - 2} tokens) do not fit behind a prefix of {len(prefix) + 3} tokens" in found


def test_faults_cost_only_their_item():
    items = {**GIVEN, "outside": ContinuationItem(id="d", continuation=(4, 99999))}
    model = reader()
    encoded, faults = encode_items(model, items, make_prefix(model, PREFIX))
    assert list(encoded) == list(GIVEN)
    assert list(faults) == ["outside"]
    assert "token ids outside the vocabulary: 99999" in faults["outside"]


def before(token: int) -> Prefix:
    return Prefix(tokens=torch.tensor([[token]]))


def test_fingerprints_are_of_content_and_tokens():
    item = GIVEN["asked"]
    same = EncodedItem(item=item, start=before(3), rows=[[4, 5], [6]])
    renamed = MultipleChoiceItem(id="other", question=item.question, choices=item.choices, answer=item.answer)
    assert EncodedItem(item=renamed, start=before(3), rows=[[4, 5], [6]]).fingerprint == same.fingerprint
    reanswered = MultipleChoiceItem(id="c", question=item.question, choices=item.choices, answer=0)
    others = [
        EncodedItem(item=item, start=before(2), rows=[[4, 5], [6]]),
        EncodedItem(item=item, start=before(3), rows=[[4], [5, 6]]),
        EncodedItem(item=reanswered, start=before(3), rows=[[4, 5], [6]]),
    ]
    assert len({other.fingerprint for other in [same, *others]}) == 4
