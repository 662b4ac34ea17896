"""Tests of hooklens.model.embed."""

import copy
import io
import pickle

import pytest
import torch

from hooklens.model.embed import Embed
from tests.model.networks import make_config, make_model, random_tokens


def test_embed_scale_is_rounded_to_the_weights_dtype():
    embed = Embed(make_config(embed_scale=12**0.5)).to(torch.bfloat16)
    torch.nn.init.normal_(embed.W_E)
    scale = torch.tensor(12**0.5).bfloat16()
    assert torch.equal(embed(torch.tensor([[3, 5]])), (embed.W_E[[3, 5]] * scale)[None])


@pytest.mark.parametrize("side", ["left", "right"])
def test_learned_positions_start_after_the_offset_and_skip_padding(side):
    model = make_model("learned, tied")
    mask = torch.tensor([[0, 0, 1, 1] if side == "left" else [1, 1, 0, 0]])
    _, cache = model.run_with_cache(random_tokens(1, 4), attention_mask=mask)
    assert torch.equal(cache["pos_embed"][0][mask[0].bool()], model.pos_embed.W_pos[2:4])
    assert torch.equal(model.W_pos, model.pos_embed.W_pos[2:])


def test_an_in_place_edit_of_positions_leaves_the_table_alone():
    model, tokens = make_model("learned, tied"), random_tokens(2, 4)
    before = model.pos_embed.W_pos.clone()

    def clear(tensor, hook):
        with torch.no_grad():
            tensor[0, 1].zero_()

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[("hook_pos_embed", clear)])
    assert torch.equal(model.pos_embed.W_pos, before)


def deep_copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def loaded(model):
    twin = make_model("learned, tied", seed=5)
    twin.load_state_dict(model.state_dict())
    return twin


def stepped(model):
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(random_tokens(2, 4), return_type="loss").backward()
    optimiser.step()
    optimiser.zero_grad()
    return model


@pytest.mark.parametrize("journey", [deep_copied, pickled, saved, loaded, stepped, lambda m: m.to(torch.float32)])
def test_a_tied_unembedding_stays_one_parameter(journey):
    model = journey(make_model("learned, tied"))
    assert "unembed.W_U" not in model.state_dict()
    assert model.unembed.W_U.data_ptr() == model.embed.W_E.data_ptr()
    with torch.no_grad():
        before = model(random_tokens(1, 3))
        model.embed.W_E.mul_(2)
        assert not torch.equal(model(random_tokens(1, 3), stop_at_layer=0), before)
        assert torch.equal(model.W_U, model.embed.W_E.T)


def test_the_gradient_of_a_tied_unembedding_is_the_sum():
    tied = make_model("learned, tied")
    state = {**{name: p.detach() for name, p in tied.named_parameters()}, "unembed.W_U": tied.W_U.detach().clone()}
    loose = type(tied).from_state_dict(state, tied.cfg.replace(tied_unembed=False))
    for model in (tied, loose):
        model(random_tokens(2, 5), return_type="loss").backward()
    total = loose.embed.W_E.grad + loose.unembed.W_U.grad.T
    torch.testing.assert_close(tied.embed.W_E.grad, total, rtol=1e-12, atol=1e-12)
