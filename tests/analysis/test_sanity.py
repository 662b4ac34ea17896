"""Sanity checks against loops over single texts with plain torch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hooklens import HookedCausalLM
from hooklens.analysis.heads import repeated_random_tokens
from hooklens.analysis.sanity import corpus_loss, indirect_object_task, induction_loss
from hooklens.bundled.corpus import held_out_indirect_objects
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.config import RotaryPositions
from hooklens.errors import InputError
from tests.model.networks import make_config, make_model

TEXTS = [
    "When Mary and John went to the store , John gave a drink to Mary .",
    "The capital of France is Paris .",
    "Then , Anna left .",
    "Mary",
]


@pytest.fixture(scope="module")
def model():
    tokenizer = build_tokenizer(n_ctx=64)
    cfg = make_config(d_vocab=len(tokenizer), n_ctx=64, positions=RotaryPositions(dim=2))
    model = HookedCausalLM(cfg, tokenizer)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def row_losses(model, tokens):
    logits = model(tokens[None])[0]
    return F.cross_entropy(logits[:-1], tokens[1:], reduction="none").detach()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_corpus_loss_is_the_mean_over_all_tokens(model, batch_size):
    rows = [model.to_tokens(text)[0] for text in TEXTS]
    losses = torch.cat([row_losses(model, row) for row in rows if len(row) > 1])
    result = corpus_loss(model, TEXTS, batch_size=batch_size)
    assert result.n_tokens == len(losses)
    # Float32 logits of padded batches.
    assert result.loss == pytest.approx(float(losses.mean()), rel=1e-5)


def test_induction_loss_is_that_of_both_passes(model):
    tokens = repeated_random_tokens(model, n_rows=3, period=6, seed=4)
    losses = torch.stack([row_losses(model, row) for row in tokens])
    result = induction_loss(model, n_rows=3, period=6, seed=4)
    # A BOS token, six random ones (predicted by columns 0 to 5), six again of which the first is a surprise.
    assert tokens.shape == (3, 13)
    assert result.first == pytest.approx(float(losses[:, :6].mean()), rel=1e-5)
    assert result.second == pytest.approx(float(losses[:, 7:].mean()), rel=1e-5)


def test_induction_loss_without_a_tokenizer():
    model = make_model("rotary")
    tokens = repeated_random_tokens(model, n_rows=2, period=5)
    losses = torch.stack([row_losses(model, row) for row in tokens])
    result = induction_loss(model, n_rows=2, period=5)
    assert result == pytest.approx((float(losses[:, :4].mean()), float(losses[:, 5:].mean())))


def test_indirect_objects_prompt_by_prompt(model):
    items = held_out_indirect_objects(12, seed=3)
    hits, differences = 0, []
    for item in items:
        logits = model(model.to_tokens(item.prompt))[0, -1].detach()
        right, wrong = (model.to_single_token(word) for word in (item.answer, item.wrong))
        hits += int(logits.argmax()) == right
        differences.append(float(logits[right] - logits[wrong]))
    result = indirect_object_task(model, items, batch_size=5)
    assert result.n_prompts == 12
    assert result.accuracy == hits / 12
    assert result.preference == sum(value > 0 for value in differences) / 12
    assert result.logit_difference == pytest.approx(sum(differences) / 12, rel=1e-4)
    assert indirect_object_task(model, n_prompts=12, seed=3) == pytest.approx(result, rel=1e-4)


def test_one_text_is_not_a_list_of_letters(model):
    """The loss was the mean over texts of one letter each."""
    with pytest.raises(InputError, match=r"texts is the text 'Mary left \.'; expected a list of texts"):
        corpus_loss(model, "Mary left .")


def test_bad_input(model):
    with pytest.raises(InputError, match="texts hold no token to predict"):
        corpus_loss(model, [])
    for batch_size in (0, -1):
        with pytest.raises(InputError, match=f"batch_size is {batch_size}, expected a whole number >= 1"):
            corpus_loss(model, TEXTS, batch_size=batch_size)
        with pytest.raises(InputError, match=f"batch_size is {batch_size}, expected a whole number >= 1"):
            indirect_object_task(model, n_prompts=2, batch_size=batch_size)
    with pytest.raises(InputError, match="period is 1, expected a whole number >= 2"):
        induction_loss(model, period=1)
    with pytest.raises(InputError, match="there are no prompts"):
        indirect_object_task(model, [])
    same = SimpleNamespace(prompt="The capital of France is", answer="Paris", wrong="Paris")
    with pytest.raises(InputError, match="'Paris' and 'Paris' to 'The capital of France is' begin with the same token"):
        indirect_object_task(model, [same])
    with pytest.raises(InputError, match="no tokenizer"):
        corpus_loss(make_model("rotary"), TEXTS)
