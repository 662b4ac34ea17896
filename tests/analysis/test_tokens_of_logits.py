from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.analysis import logits_to_frame
from hooklens.errors import InputError


def test_the_likeliest_tokens() -> None:
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    logits = model("When Mary and John went to the")[0, -1]
    table = logits_to_frame(logits, model.tokenizer, k=5)
    assert list(table.columns) == ["token", "text", "logit", "logprob", "probability"]
    best = logits.topk(5)
    assert table["token"].tolist() == best.indices.tolist()
    assert table["text"].tolist() == [model.to_single_str_token(token) for token in best.indices.tolist()]
    torch.testing.assert_close(torch.tensor(table["logit"]).float(), best.values.detach())
    probabilities = logits.softmax(-1)[best.indices].double()
    torch.testing.assert_close(torch.tensor(table["probability"]), probabilities, atol=1e-6, rtol=1e-5)
    every = logits_to_frame(logits, k=None)
    assert len(every) == len(logits)
    assert every["probability"].sum() == pytest.approx(1, abs=1e-5)
    assert "text" not in every


def test_bad_input_is_told() -> None:
    with pytest.raises(InputError, match=r"logits are \[2, 3\]; expected those of one position"):
        logits_to_frame(torch.zeros(2, 3))
    with pytest.raises(InputError, match="k=0; expected 1 or more"):
        logits_to_frame(torch.zeros(3), k=0)


def test_where_given_tokens_stand() -> None:
    model = HookedCausalLM.from_pretrained("bundled:tiny-llama")
    logits = model("When Mary and John went to the")[0, -1].detach()
    every = logits_to_frame(logits, model.tokenizer, k=None)
    assert every.index.name == "rank"
    assert every.index.tolist() == list(range(len(logits)))
    john, mary = (model.to_single_token(name) for name in ("John", "Mary"))
    for asked in (["John", "Mary", "John"], [john, mary, john], torch.tensor([john, mary, john]), ("John", mary, john)):
        table = logits_to_frame(logits, model.tokenizer, tokens=asked)
        assert table["token"].tolist() == [john, mary, john]
        # As many tokens are likelier.
        assert table.index.tolist() == [int((logits > logits[one]).sum()) for one in (john, mary, john)]
        for rank, line in table.iterrows():
            assert line.to_dict() == every.loc[rank].to_dict()


def test_of_equal_logits_smaller_ids_stand_first() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 1.0])
    assert logits_to_frame(logits, tokens=[3, 2, 1, 0]).index.tolist() == [2, 1, 0, 3]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([4], r"tokens holds \[4\]; expected ids from 0 to 3"),
        (["Mary"], "tokens holds the text 'Mary', which needs a tokenizer"),
        ("Mary", "a list of token ids or of texts"),
        ([], "a list of token ids or of texts"),
        ([1.5], "a list of token ids or of texts"),
        ([True], "a list of token ids or of texts"),
        (torch.zeros(1, 1, dtype=torch.long), "a list of token ids or of texts"),
    ],
)
def test_tokens_that_are_none_are_told(tokens: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        logits_to_frame(torch.zeros(4), tokens=tokens)
