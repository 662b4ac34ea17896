"""An input as it enters the first block."""

import pytest
import torch

from hooklens.config import LearnedPositions, ShortformerPositions, SinusoidalPositions
from hooklens.errors import InputError
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, make_config, make_model, random_tokens
from tests.word_models import make_word_model

CONFIGS = {
    **ALL_CONFIGS,
    "learned": make_config(positions=LearnedPositions()),
    "sinusoidal": make_config(positions=SinusoidalPositions()),
    "shortformer": make_config(positions=ShortformerPositions()),
}
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "padded"])
@pytest.mark.parametrize("network", CONFIGS)
def test_a_call_goes_on_from_what_is_embedded(network, mask):
    model, ids = make_model(CONFIGS[network]), random_tokens(2, 6)
    embedded = model.input_to_embed(ids, attention_mask=mask)
    plain, cache = model.run_with_cache(ids, attention_mask=mask, names_filter=["blocks.0.hook_resid_pre"])
    assert torch.equal(embedded.stream, cache["blocks.0.hook_resid_pre"])
    assert torch.equal(embedded.tokens, ids)
    assert embedded.attention_mask is None if mask is None else torch.equal(embedded.attention_mask, mask.bool())
    logits = model(
        embedded.stream, start_at_layer=0, attention_mask=embedded.attention_mask, positions=embedded.positions
    )
    real = torch.ones(2, 6, dtype=torch.bool) if mask is None else mask.bool()
    assert torch.equal(logits[real], plain[real])


@pytest.mark.parametrize("network", ["learned, tied", "sinusoidal", "rotary"])
def test_a_cache_tells_positions_and_is_not_appended_to(network):
    model, ids = make_model(CONFIGS[network]), random_tokens(2, 7)
    whole = model.input_to_embed(ids)
    for kv in (model.prefill(ids[:, :4]), model.prefill(ids[:, :4]).clone().unfreeze()):
        later = model.input_to_embed(ids[:, 4:], past_kv_cache=kv)
        assert len(kv) == 4
        assert torch.equal(later.stream, whole.stream[:, 4:])
        assert torch.equal(later.positions.expand(2, -1), whole.positions.expand(2, -1)[:, 4:])


def test_text_is_embedded_under_the_rules_of_a_call():
    model = make_word_model(d_model=16, n_ctx=32, init_std=0.4)
    texts = ["Mary went to the store", "John went"]
    for say in ({}, {"prepend_bos": False}, {"padding_side": "left"}):
        batch = model.to_tokens(texts, return_attention_mask=True, **say)
        embedded = model.input_to_embed(texts, **say)
        assert torch.equal(embedded.tokens, batch.tokens)
        assert torch.equal(embedded.attention_mask, batch.attention_mask.bool())
        found = model(
            embedded.stream, start_at_layer=0, attention_mask=embedded.attention_mask, positions=embedded.positions
        )
        real = embedded.attention_mask
        assert torch.equal(found[real], model(texts, **say)[real])


def test_hook_points_below_the_blocks_fire_and_gradients_flow():
    model, ids = make_model(CONFIGS["learned"]), random_tokens(1, 4)
    plain = model.input_to_embed(ids).stream
    with model.hooks([("hook_embed", lambda x, hook: 2 * x)]):
        changed = model.input_to_embed(ids).stream
    assert torch.allclose(changed, plain + model.embed(ids), rtol=0, atol=1e-12)
    plain.sum().backward()
    assert model.embed.table.weight.grad.abs().max() > 0


def test_arguments_are_read_as_those_of_a_call():
    model = make_model("rotary")
    with unchecked(), pytest.raises(InputError, match=r"prepend_bos.*attention_mask"):
        model.input_to_embed(random_tokens(1, 3), prepend_bos="no", attention_mask="all")
    with pytest.raises(InputError, match="outside"):
        model.input_to_embed(torch.tensor([[999]]))
