"""Kept views of weights must never show anything but the weights."""

import copy
import pickle

import pytest
import torch

from tests.model.networks import make_model, random_tokens

TOKENS = random_tokens(2, 6)


def double_in_place(model):
    for parameter in model.parameters():
        parameter.mul_(2)


def replace_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data * 2


def replace_parameters(model):
    for block in model.block_list():
        block.mlp.W_out = torch.nn.Parameter(block.mlp.W_out * 2)
        block.attn.W_Q = torch.nn.Parameter(block.attn.W_Q * 2)


def load_in_other_layout(model):
    state = {
        name: 2 * tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()
    }
    model.load_state_dict(state, assign=True)


def load_in_other_layout_then_double(model):
    load_in_other_layout(model)
    model(TOKENS)
    double_in_place(model)


def convert(model):
    model.to(torch.float32)


CHANGES = [
    double_in_place,
    replace_data,
    replace_parameters,
    load_in_other_layout,
    load_in_other_layout_then_double,
    convert,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("network", ["grouped", "learned, tied"])
@torch.no_grad()
def test_a_change_of_the_weights_shows_in_the_next_call(network, change):
    model = make_model(network)
    before = model(TOKENS)
    change(model)
    after = model(TOKENS)
    fresh = copy.deepcopy(model)
    assert "_kept_views" not in fresh.blocks[0].mlp.__dict__
    assert torch.equal(after, fresh(TOKENS))
    assert change is convert or not torch.allclose(before, after)


@torch.no_grad()
def test_a_conversion_lets_go_of_the_memory():
    """A kept view of the old weights would hold a second copy of the model until the next call."""
    model = make_model("rotary")
    model(TOKENS)
    assert "_kept_views" in model.blocks[0].attn.__dict__
    model.to(torch.float32)
    assert all("_kept_views" not in module.__dict__ for module in model.modules())


def test_views_are_made_anew_where_gradients_flow():
    model = make_model("rotary")
    with torch.no_grad():
        plain = model(TOKENS)
    loss = model(TOKENS, return_type="loss")
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert torch.allclose(model(TOKENS), plain, atol=1e-12, rtol=0)


@torch.no_grad()
def test_views_made_in_inference_mode_serve_outside_of_it():
    model = make_model("grouped")
    with torch.inference_mode():
        inside = model(TOKENS).clone()
    assert torch.equal(model(TOKENS), inside)
    with torch.enable_grad():
        model(TOKENS, return_type="loss").backward()


@torch.no_grad()
def test_views_are_not_pickled():
    model = make_model("rotary")
    expected = model(TOKENS)
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS), expected)
