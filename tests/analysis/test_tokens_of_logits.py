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
