"""Tests of hooklens.model.parameters."""

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import CheckpointError
from hooklens.model.parameters import ModelWeights
from hooklens.weights.layout import is_stored_layout
from tests.model.networks import CONFIGS, make_model, random_tokens


def state_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("network", CONFIGS)
def test_weights_by_name_share_memory(network):
    model = make_model(network)
    weights = ModelWeights(model)
    expected = set(state_of(model)) | {"unembed.W_U"}
    assert set(weights) == expected
    assert len(weights) == len(expected)
    for name, parameter in model.named_parameters():
        assert weights[name].data_ptr() == parameter.data_ptr()
        assert not weights[name].requires_grad
    assert torch.equal(weights["unembed.W_U"], model.W_U)
    for name in ("nothing.W_Q", "blocks.0.attn", "blocks.0.attn.W_X", "cfg"):
        with pytest.raises(KeyError, match=name):
            weights[name]


@pytest.mark.parametrize("network", CONFIGS)
def test_from_state_dict_uses_tensors_as_they_are(network):
    model, tokens = make_model(network), random_tokens(2, 5)
    twin = HookedCausalLM.from_state_dict(state_of(model), model.cfg)
    for (name, ours), theirs in zip(twin.named_parameters(), model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr(), name
    assert torch.equal(twin(tokens), model(tokens))


def test_another_layout_is_brought_into_the_stored_one():
    model = make_model("grouped")
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state_of(model).items()}
    assert not is_stored_layout("W_Q", state["blocks.0.attn.W_Q"])
    twin = HookedCausalLM.from_state_dict(state, model.cfg)
    assert all(is_stored_layout(name, parameter) for name, parameter in twin.named_parameters())
    assert torch.equal(twin(random_tokens(2, 5)), model(random_tokens(2, 5)))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("blocks.1.attn.W_Q"), r"1 parameters have no tensor: 'blocks.1.attn.W_Q'"),
        (lambda s: s.update({"blocks.1.attn.W_q": s["blocks.1.attn.W_Q"]}), r"no parameter 'blocks.1.attn.W_q'\. Did"),
        (lambda s: s.update({"embed.W_E": s["embed.W_E"].T}), r"'embed.W_E' has shape \[12, 23\]; expected \[23, 12\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, text):
    model = make_model("grouped")
    state = state_of(model)
    change(state)
    with pytest.raises(CheckpointError, match=text):
        HookedCausalLM.from_state_dict(state, model.cfg)


def test_a_tied_state_must_be_tied():
    model = make_model("learned, tied")
    state = {**state_of(model), "unembed.W_U": model.W_U.detach().clone()}
    HookedCausalLM.from_state_dict(state, model.cfg)
    state["unembed.W_U"] = state["unembed.W_U"] + 1
    with pytest.raises(CheckpointError, match=r"tied_unembed is True, but unembed.W_U is not the transpose.*=False to"):
        HookedCausalLM.from_state_dict(state, model.cfg)
