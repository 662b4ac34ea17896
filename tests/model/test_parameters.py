"""Tests of hooklens.model.parameters: two names of every weight, and what TransformerLens saved."""

import re

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.errors import CheckpointError
from hooklens.model.parameters import ModelWeights, name_as_field, read_state
from tests.model.networks import CONFIGS, make_model, random_tokens


def state_of(model):
    """Under the names of the modules that hold the weights."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def fields_of(model):
    """Under the field's names, each tensor a contiguous copy in the logical shape."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.named_weights().items()}


def mixed_of(model):
    """Every other weight under the field's name."""
    state, fields = state_of(model), fields_of(model)
    for name, weight in list(model.cfg.description.weights.items())[::2]:
        if weight.parameter in state:
            del state[weight.parameter]
            state[name] = fields[name]
    return state


KINDS = {"module names": state_of, "field names": fields_of, "both": mixed_of}


@pytest.mark.parametrize("network", CONFIGS)
def test_weights_by_name_share_memory(network):
    model = make_model(network)
    weights = ModelWeights(model)
    declared = model.cfg.description.weights
    assert list(weights) == list(declared)
    assert len(weights) == len(declared)
    held = {weight.parameter for name, weight in declared.items() if name != "unembed.W_U"}
    assert held | {declared["unembed.W_U"].parameter} >= set(state_of(model)) >= held
    for name, weight in weights.items():
        if name == "unembed.W_U" and model.cfg.tied_unembed:
            parameter = model.embed.table.weight
        else:
            parameter = model.get_parameter(declared[name].parameter)
        assert weight.shape == declared[name].shape
        assert weight.data_ptr() == parameter.data_ptr()
        assert not weight.requires_grad
    assert torch.equal(weights["unembed.W_U"], model.W_U)
    for name in ("nothing.W_Q", "blocks.0.attn", "blocks.0.attn.W_X", "blocks.0.attn.q_proj.weight", "cfg"):
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
    state = fields_of(model)
    assert state["blocks.0.attn.W_Q"].stride() != model.block_list()[0].attn.W_Q.stride()
    twin = HookedCausalLM.from_state_dict(state, model.cfg)
    for weight in model.cfg.description.weights.values():
        parameter = twin.get_parameter(weight.parameter)
        assert parameter.shape == weight.stored_shape
        assert parameter.is_contiguous(), weight.name
    assert torch.equal(twin(random_tokens(2, 5)), model(random_tokens(2, 5)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", CONFIGS)
class TestEveryName:
    def test_from_state_dict(self, network, kind):
        model, tokens = make_model(network), random_tokens(2, 5)
        twin = HookedCausalLM.from_state_dict(KINDS[kind](model), model.cfg)
        assert state_of(twin).keys() == state_of(model).keys()
        assert torch.equal(twin(tokens), model(tokens))

    @pytest.mark.parametrize("assign", [False, True])
    def test_load_state_dict(self, network, kind, assign):
        model, fresh, tokens = make_model(network), make_model(network, seed=9), random_tokens(2, 5)
        assert not torch.equal(fresh(tokens), model(tokens))
        state = KINDS[kind](model)
        before = {name: tensor.clone() for name, tensor in state.items()}
        result = fresh.load_state_dict(state, assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert torch.equal(fresh(tokens), model(tokens))
        assert all(parameter.is_contiguous() for parameter in fresh.parameters())
        # What was handed in is as it was.
        assert list(state) == list(before)
        assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())

    def test_one_weight_is_missing(self, network, kind):
        model, fresh = make_model(network), make_model(network, seed=9)
        state = KINDS[kind](model)
        for name in ("blocks.1.mlp.W_in", "blocks.1.mlp.in_proj.weight"):
            state.pop(name, None)
        with pytest.raises(CheckpointError, match=r"1 parameters have no tensor: 'blocks.1.mlp.W_in'"):
            HookedCausalLM.from_state_dict(state, model.cfg)
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"blocks.1.mlp.in_proj.weight\""):
            fresh.load_state_dict(state)
        assert fresh.load_state_dict(state, strict=False).missing_keys == ["blocks.1.mlp.in_proj.weight"]

    def test_names_that_the_network_does_not_have(self, network, kind):
        model, fresh = make_model(network), make_model(network, seed=9)
        state = {**KINDS[kind](model), "blocks.1.attn.W_X": torch.ones(3)}
        with pytest.raises(CheckpointError, match=r"no parameter 'blocks.1.attn.W_X'"):
            HookedCausalLM.from_state_dict(state, model.cfg)
        with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"blocks.1.attn.W_X\""):
            fresh.load_state_dict(state)
        assert fresh.load_state_dict(state, strict=False).unexpected_keys == ["blocks.1.attn.W_X"]

    def test_name_as_field(self, network, kind):
        model = make_model(network)
        named, expected = name_as_field(model.cfg, KINDS[kind](model)), model.named_weights()
        assert set(expected) - {"unembed.W_U"} <= set(named) <= set(expected)
        for name, tensor in named.items():
            assert torch.equal(tensor, expected[name]), name


def saved_by_transformer_lens(model):
    """What TransformerLens 2.x saves of a network, beside its weights: masks, tables, biases that are 0.

    `HookedTransformer.state_dict()` holds `mask` (`[n_ctx, n_ctx]`) and `IGNORE` (a number) of each attention,
    `rotary_sin` and `rotary_cos` where positions are rotary, and `_W_K` in the place of `W_K` where query heads share.
    """
    cfg, state = model.cfg, {}
    shared = cfg.n_kv_heads < cfg.n_heads
    for name, tensor in fields_of(model).items():
        path, _, word = name.rpartition(".")
        is_shared = shared and word in ("W_K", "W_V", "b_K", "b_V")
        state[f"{path}._{word}" if is_shared else name] = tensor
    for layer in range(cfg.n_layers):
        attn, mlp = f"blocks.{layer}.attn", f"blocks.{layer}.mlp"
        state[f"{attn}.mask"] = torch.ones(cfg.n_ctx, cfg.n_ctx).tril().bool()
        state[f"{attn}.IGNORE"] = torch.tensor(-torch.inf)
        state[f"{attn}.rotary_sin"] = torch.randn(cfg.n_ctx, 2)
        state[f"{attn}.rotary_cos"] = torch.randn(cfg.n_ctx, 2)
        zeros = {
            f"{attn}.b_Q": (cfg.n_heads, cfg.d_head),
            f"{attn}.{'_' * shared}b_K": (cfg.n_kv_heads, cfg.d_head),
            f"{attn}.{'_' * shared}b_V": (cfg.n_kv_heads, cfg.d_head),
            f"{attn}.b_O": (cfg.d_model,),
            f"{mlp}.b_in": (cfg.d_mlp,),
            f"{mlp}.b_out": (cfg.d_model,),
        }
        for name, shape in zeros.items():
            state.setdefault(name, torch.zeros(shape))
    state.setdefault("unembed.b_U", torch.zeros(cfg.d_vocab))
    return state


LOADERS = {
    "load_state_dict": lambda model, state: (model.load_state_dict(state), model)[1],
    "assign": lambda model, state: (model.load_state_dict(state, assign=True), model)[1],
    "from_state_dict": lambda model, state: HookedCausalLM.from_state_dict(state, model.cfg),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
class TestTransformerLens:
    @pytest.mark.parametrize("network", ["rotary", "grouped", "alibi, grouped", "learned, tied", "shared norm"])
    def test_its_state_dicts_load(self, network, load):
        model, tokens = make_model(network), random_tokens(2, 5)
        state = saved_by_transformer_lens(model)
        assert ("blocks.0.attn._W_K" in state) == (model.cfg.n_kv_heads < model.cfg.n_heads)
        loaded = load(make_model(network, seed=9), state)
        assert torch.equal(loaded(tokens), model(tokens))
        assert loaded.state_dict().keys() == model.state_dict().keys()

    @pytest.mark.parametrize("bias", ["blocks.1.attn.b_Q", "blocks.0.attn._b_K", "blocks.1.mlp.b_in", "unembed.b_U"])
    def test_a_bias_that_says_something_is_not_dropped(self, bias, load):
        model = make_model("grouped")
        state = saved_by_transformer_lens(model)
        assert bias in state
        state[bias] = state[bias].clone()
        state[bias].flatten()[3] = 1e-9
        with pytest.raises((CheckpointError, RuntimeError), match=bias.replace("._", "._?")):
            load(make_model("grouped", seed=9), state)

    def test_a_bias_of_nan_is_not_dropped(self, load):
        model = make_model("grouped")
        state = {**fields_of(model), "unembed.b_U": torch.full((23,), torch.nan)}
        with pytest.raises((CheckpointError, RuntimeError), match=r"unembed.b_U"):
            load(make_model("grouped", seed=9), state)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("blocks.0.attn.W_Q", lambda w: w.mT),
            ("blocks.1.mlp.W_in", lambda w: w.T),
            ("embed.W_E", lambda w: w[:-1]),
            ("blocks.0.ln1.w", lambda w: w[None]),
            ("unembed.W_U", lambda w: w.T),
            # Under the field's name in the shape of the module's matrix.
            ("blocks.1.attn.W_O", lambda w: w.flatten(0, 1).T),
        ],
    )
    def test_another_shape_is_refused(self, name, change, load):
        model = make_model("grouped")
        state = fields_of(model)
        wanted, state[name] = list(state[name].shape), change(state[name])
        found = re.escape(str(list(state[name].shape)))
        text = rf"'{name}' (is|has shape) {found}[,;] expected {re.escape(str(wanted))}"
        with pytest.raises(CheckpointError, match=text):
            load(make_model("grouped", seed=9), state)

    def test_a_tied_unembedding_that_differs_is_refused(self, load):
        model = make_model("learned, tied")
        state = fields_of(model)
        loaded = load(make_model("learned, tied", seed=9), state)
        assert torch.equal(loaded(random_tokens(1, 3)), model(random_tokens(1, 3)))
        state["unembed.W_U"] = state["unembed.W_U"] + 1
        with pytest.raises(
            CheckpointError, match=r"unembed.W_U is not the transpose of embed.W_E.*=False to keep both"
        ):
            load(make_model("learned, tied", seed=9), state)


def test_all_weights_of_another_shape_are_named_at_once():
    model = make_model("grouped")
    state = fields_of(model)
    state["embed.W_E"], state["blocks.1.attn.W_K"] = torch.zeros(3, 12), torch.zeros(4, 12, 6)
    text = (
        r"weights of another shape than the network's: 'embed.W_E' is \[3, 12\], expected \[23, 12\]; "
        r"'blocks.1.attn.W_K' is \[4, 12, 6\], expected \[2, 12, 6\]"
    )
    with pytest.raises(CheckpointError, match=text):
        model.load_state_dict(state)
    assert not model.embed.W_E.eq(0).all()


def test_one_weight_under_both_names_is_refused():
    """One of the two would silently win."""
    model = make_model("grouped")
    state = {**state_of(model), "blocks.0.attn.W_Q": model.block_list()[0].attn.W_Q.detach() + 1}
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.W_Q"):
        model.load_state_dict(state)
    with pytest.raises(CheckpointError, match=r"blocks.0.attn.W_Q"):
        HookedCausalLM.from_state_dict(state, model.cfg)


def test_module_names_are_left_to_pytorch():
    model = make_model("grouped")
    state = model.state_dict()
    read = read_state(model.as_decoder(), state)
    assert read.keys() == state.keys()
    assert all(read[name] is tensor for name, tensor in state.items())


def test_a_tied_unembedding_beside_module_names():
    model, tokens = make_model("learned, tied"), random_tokens(1, 4)
    assert "unembed.proj.weight" not in model.state_dict()
    fresh = make_model("learned, tied", seed=9)
    fresh.load_state_dict({**state_of(model), "unembed.W_U": model.W_U.detach()})
    assert torch.equal(fresh(tokens), model(tokens))
    with pytest.raises(CheckpointError, match=r"unembed.W_U is not the transpose of embed.W_E"):
        fresh.load_state_dict({**state_of(model), "unembed.W_U": model.W_U.detach() + 1})


def test_no_bias_of_a_norm_is_mistaken_for_that_of_a_map():
    """`ln1.b` is no `b_` of a map; without that norm's bias in the network it is a name like any other."""
    model = make_model("grouped")
    state = {**fields_of(model), "blocks.0.ln1.b": torch.ones(12)}
    with pytest.raises(CheckpointError, match=r"no parameter 'blocks.0.ln1.b'"):
        HookedCausalLM.from_state_dict(state, model.cfg)
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"blocks.0.ln1.b\""):
        model.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("blocks.1.attn.q_proj.weight"), r"1 parameters have no tensor: 'blocks.1.attn.W_Q'"),
        (lambda s: s.update({"blocks.1.attn.W_q": torch.zeros(4, 12, 6)}), r"no parameter 'blocks.1.attn.W_q'\. Did"),
        (
            lambda s: s.update({"embed.W_E": s.pop("embed.table.weight").T}),
            r"'embed.W_E' has shape \[12, 23\]; expected \[23, 12\]",
        ),
        (
            lambda s: s.update({"blocks.1.attn.q_proj.weight": torch.zeros(4, 12, 6)}),
            r"'blocks.1.attn.q_proj.weight' has shape \[4, 12, 6\]; expected \[24, 12\]",
        ),
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
