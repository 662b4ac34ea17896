"""Tests of hooklens.model.parts.stacked: how the maps of experts are held."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from hooklens.errors import ConfigError
from hooklens.model.parts.stacked import StackedLinear
from tests.model.moe.layers import MIXTURES, make_layer, make_mixed_model, random_stream
from tests.model.networks import random_tokens

HELD = {"W_gate": "gate_maps", "W_in": "in_maps", "W_out": "out_maps"}


def test_each_expert_is_held_as_a_linear_map_would_be():
    layer = make_layer(MIXTURES["clamped, biased"])
    for name, module in HELD.items():
        maps = getattr(layer, module)
        assert type(maps) is StackedLinear
        assert maps.weight.is_contiguous()
        for expert in range(6):
            linear = nn.Linear(*getattr(layer, name)[expert].shape, dtype=torch.float64)
            state = {"weight": maps.weight[expert], "bias": maps.bias[expert]}
            linear.load_state_dict(state)
            torch.testing.assert_close(linear.weight.T, getattr(layer, name)[expert], rtol=0, atol=0)
            torch.testing.assert_close(linear.bias, getattr(layer, f"b_{name[2:]}")[expert], rtol=0, atol=0)
    assert "n_maps=6, into=12, out_of=5, bias=True" in repr(layer.in_maps)
    assert make_layer(MIXTURES["softmax"]).in_maps.bias is None


def test_a_state_dict_under_either_name_loads(tmp_path):
    """Files from before experts were held so have the field's names and shapes."""
    model, tokens = make_mixed_model(MIXTURES["clamped, biased"]), random_tokens(2, 5)
    expected = model(tokens)
    field = {name: weight.contiguous() for name, weight in model.named_weights().items()}
    assert field["blocks.0.mlp.W_in"].shape == (6, 12, 5)
    assert model.state_dict()["blocks.0.mlp.in_maps.weight"].shape == (6, 5, 12)
    for state in (field, model.state_dict()):
        save_file(state, tmp_path / "state.safetensors")
        other = make_mixed_model(MIXTURES["clamped, biased"])
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(load_file(tmp_path / "state.safetensors"))
        assert torch.equal(other(tokens), expected)


def test_gradients_of_the_views_are_the_parameters_own():
    layer = make_layer(MIXTURES["clamped, biased"])
    layer(random_stream()).square().sum().backward()
    for name, module in HELD.items():
        held = getattr(layer, module).weight
        assert held.grad.is_contiguous()
        assert torch.equal(getattr(layer, name).grad, held.grad.mT)


def test_one_expert_is_edited_in_place_and_all_are_assigned():
    layer, x = make_layer(MIXTURES["renormalised"]), random_stream()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.W_out[2] = 0
    assert not other.out_maps.weight[2].any()
    assert not torch.equal(other(x), layer(x))
    other.W_out = layer.W_out.detach()
    assert other.out_maps.weight.is_contiguous()
    assert torch.equal(other(x), layer(x))


class _Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrisation_of_the_maps_is_what_runs():
    layer, x = make_layer(MIXTURES["softmax"]), random_stream()
    plain = layer(x)
    parametrize.register_parametrization(layer.out_maps, "weight", _Doubled())
    torch.testing.assert_close(layer(x), 2 * plain, rtol=1e-12, atol=1e-12)


def test_what_stands_in_their_place_is_not_read_as_weights():
    layer = make_layer(MIXTURES["softmax"])
    layer.in_maps = nn.Identity()
    with pytest.raises(ConfigError, match="a Identity stands in the place of in_maps"):
        _ = layer.W_in
