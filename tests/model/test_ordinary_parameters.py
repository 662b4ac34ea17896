"""PyTorch's own tools on a network: each finds ordinary linear maps, and what it changes is what runs."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from hooklens import HookedCausalLM
from hooklens.errors import ConfigError
from tests.model.networks import ALL_CONFIGS, make_model, random_tokens

# Rebuilding a network from its weights under the field's names is the independent way to know what a tool has made.
PROJECTIONS = ["blocks.0.attn.q_proj", "blocks.1.attn.k_proj", "blocks.1.attn.o_proj", "blocks.0.mlp.in_proj"]


def rebuilt(model):
    state = {name: weight.clone() for name, weight in model.named_weights().items()}
    return HookedCausalLM.from_state_dict(state, model.cfg)


def linear_maps(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_every_linear_map_is_a_plain_one_with_contiguous_weights(network):
    model = make_model(network)
    maps = linear_maps(model)
    assert all(type(module) is nn.Linear for module in maps.values())
    # Latent attention has two maps for queries, four for keys and values.
    of_attention = {None: 0, "attention": 4, "mla": 7}
    in_blocks = [
        of_attention[block.attn and block.attn.kind] + (3 if model.cfg.gated_mlp else 2) * (block.mlp is not None)
        for block in model.cfg.blocks
    ]
    assert len(maps) == sum(in_blocks) + (not model.cfg.tied_unembed)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    for module in maps.values():
        assert module.weight.shape == (module.out_features, module.in_features)


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_parameters_to_vector_and_back(network):
    """It refused the strided parameters of a network."""
    model, other, tokens = make_model(network), make_model(network, seed=3), random_tokens(2, 5)
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector, other.parameters())
    # Views of the vector begin at any byte, so that kernels may sum in another order.
    torch.testing.assert_close(other(tokens), model(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_pruning(name):
    model, tokens = make_model("grouped"), random_tokens(2, 5)
    plain = model(tokens)
    linear = model.get_submodule(name)
    prune.l1_unstructured(linear, "weight", amount=0.5)
    pruned = model(tokens)
    assert not torch.equal(pruned, plain)
    # 1e-12: the weights are read through another layout, and products sum in another order.
    torch.testing.assert_close(rebuilt(model)(tokens), pruned, rtol=1e-12, atol=1e-12)
    prune.remove(linear, "weight")
    assert torch.equal(model(tokens), pruned)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class ViewOfItself(nn.Module):
    def forward(self, weight):
        return weight.T.contiguous().T


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_parametrisation(name, mode):
    """A parametrisation that returned a view left the old logits under no_grad."""
    model, tokens = make_model("grouped"), random_tokens(2, 5)
    with mode():
        plain = model(tokens)
        parametrize.register_parametrization(model.get_submodule(name), "weight", ViewOfItself())
        torch.testing.assert_close(model(tokens), plain, rtol=1e-12, atol=1e-12)
        parametrize.register_parametrization(model.get_submodule(name), "weight", Doubled())
        doubled = model(tokens)
        assert not torch.allclose(doubled, plain)
        torch.testing.assert_close(rebuilt(model)(tokens), doubled, rtol=1e-12, atol=1e-12)
        parametrize.remove_parametrizations(model.get_submodule(name), "weight")
        assert torch.equal(model(tokens), doubled)


@pytest.mark.parametrize("network", ALL_CONFIGS)
@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adafactor])
def test_optimisers_change_what_runs(network, optimiser):
    model, tokens = make_model(network), random_tokens(2, 6)
    step = optimiser(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(tokens, return_type="loss")
        losses.append(loss.item())
        step.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        step.step()
    assert losses[-1] < losses[0]
    torch.testing.assert_close(rebuilt(model)(tokens), model(tokens), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_functional_call_and_an_ensemble_by_vmap(network):
    models, tokens = [make_model(network, seed=seed) for seed in (0, 1, 2)], random_tokens(2, 5)
    parameters, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")

    def run(one, buffer):
        return torch.func.functional_call(skeleton, (one, buffer), (tokens,))

    with torch.no_grad():
        alone = torch.func.functional_call(models[0], dict(models[1].named_parameters()), (tokens,))
        assert torch.equal(alone, models[1](tokens))
        if "capped" not in network and "alibi" not in network:
            together = torch.func.vmap(run)(parameters, buffers)
            for row, model in zip(together, models, strict=True):
                # 1e-10: batched products sum in another order.
                torch.testing.assert_close(row, model(tokens), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_swapped_tensors_run(network):
    model, other, tokens = make_model(network), make_model(network, seed=3), random_tokens(2, 5)
    expected = other(tokens).detach().clone()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.utils.swap_tensors(ours, theirs)
    assert torch.equal(model(tokens), expected)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_load_state_dict(network, assign):
    model, other, tokens = make_model(network), make_model(network, seed=3), random_tokens(2, 5)
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert torch.equal(model(tokens), other(tokens))
    if assign:
        assert model.embed.table.weight.data_ptr() == state["embed.table.weight"].data_ptr()


class Shifted(nn.Module):
    """Something with the call of a linear map, which is none: a quantised one, say."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x) + 0.5


def test_a_projection_may_be_replaced_by_any_module_with_the_same_call():
    model, tokens = make_model("rotary"), random_tokens(2, 5)
    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_pre", lambda t, hook: t + 0.5)])
    model.blocks[0].mlp.in_proj = Shifted(model.blocks[0].mlp.in_proj)
    assert torch.equal(model(tokens), expected)
    with pytest.raises(ConfigError, match="W_in: a Shifted stands in the place of in_proj"):
        model.blocks[0].mlp.W_in  # noqa: B018
    # Behind the back of setattr, as quantisers do it.
    model.blocks[1].mlp._modules["out_proj"] = Shifted(model.blocks[1].mlp.out_proj)
    replaced = model(tokens)
    _, cache = model.run_with_cache(tokens)
    linear = model.blocks[1].mlp.out_proj.linear
    torch.testing.assert_close(cache["mlp_out", 1], linear(cache["post", 1]) + 0.5, rtol=1e-12, atol=1e-12)
    assert not torch.equal(replaced, expected)


@pytest.mark.parametrize("network", ["rotary", "grouped"])
def test_heads_of_a_replaced_projection_are_read_one_by_one(network):
    """Per-head inputs and results need what one head does, also where a module stands around the map."""
    model, tokens = make_model(network), random_tokens(2, 5)
    wrapped = copy.deepcopy(model)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(wrapped.blocks[1].attn, name, nn.Sequential(getattr(wrapped.blocks[1].attn, name)))
    hooks = [
        ("blocks.1.hook_q_input", lambda t, hook: t * torch.linspace(0.5, 1, t.shape[2])[:, None]),
        ("blocks.1.hook_k_input", lambda t, hook: t + 0.1),
        ("blocks.1.attn.hook_result", lambda t, hook: t * torch.linspace(0.5, 1, t.shape[2])[:, None]),
    ]
    torch.testing.assert_close(
        wrapped.run_with_hooks(tokens, fwd_hooks=hooks),
        model.run_with_hooks(tokens, fwd_hooks=hooks),
        rtol=1e-10,
        atol=1e-10,
    )
    _, ours = wrapped.run_with_cache(tokens, names_filter="result")
    _, expected = model.run_with_cache(tokens, names_filter="result")
    torch.testing.assert_close(ours["result", 1], expected["result", 1], rtol=1e-10, atol=1e-10)


def test_module_hooks_and_forwards_put_around_a_map_act():
    model, tokens = make_model("rotary"), random_tokens(2, 5)
    plain = model(tokens)
    linear = model.blocks[0].attn.q_proj
    for register in (
        lambda: linear.register_forward_hook(lambda module, args, out: out * 0),
        lambda: linear.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    ):
        handle = register()
        assert not torch.equal(model(tokens), plain)
        handle.remove()
        assert torch.equal(model(tokens), plain)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    model(tokens)
    handle.remove()
    assert linear in seen
    # As accelerate puts a model's parts where they are needed.
    linear.forward = lambda x: nn.functional.linear(x, linear.weight, linear.bias) * 0
    assert not torch.equal(model(tokens), plain)


class TestPeft:
    @pytest.mark.parametrize("network", ["rotary", "grouped", "shared norm", "capped"])
    def test_lora_directly_on_a_model(self, network):
        import peft

        model, tokens = make_model(network, dtype=torch.float32), random_tokens(2, 5)
        plain = model(tokens).detach()
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj", "o_proj", "out_proj"], init_lora_weights=False
        )
        adapted = peft.get_peft_model(model, config)
        logits = adapted(tokens)
        assert not torch.allclose(logits, plain)

        fired = []
        with adapted.base_model.model.hooks([("blocks.1.attn.hook_q", lambda t, hook: fired.append(hook.name))]):
            assert torch.equal(adapted(tokens), logits)
        assert fired == ["blocks.1.attn.hook_q"]
        _, cache = model.run_with_cache(tokens)
        assert len(cache) > 20
        with adapted.disable_adapter():
            torch.testing.assert_close(adapted(tokens), plain)
        adapted(tokens, return_type="loss").backward()
        trained = [name for name, parameter in adapted.named_parameters() if parameter.grad is not None]
        assert trained
        assert all("lora" in name for name in trained)

        merged = adapted.merge_and_unload()
        assert isinstance(merged, HookedCausalLM)
        # 1e-4: the merged weights are float32 sums.
        torch.testing.assert_close(merged(tokens), logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rebuilt(merged)(tokens), merged(tokens))


class TestStaleWeights:
    """Weights were multiplied in an old form that was remembered by address: up to 12 off under no_grad."""

    CHANGES: ClassVar[dict] = {
        "expanded": lambda attn: setattr(attn, "W_Q", nn.Parameter(attn.W_Q.detach()[:1].expand(attn.W_Q.shape))),
        "another layout": lambda attn: setattr(
            attn, "W_Q", attn.W_Q.detach().transpose(1, 2).clone().transpose(1, 2) * 2
        ),
        "in place": lambda attn: attn.W_Q[1].mul_(3),
        "through data": lambda attn: attn.W_Q.data.mul_(-1),
        "the stored one": lambda attn: setattr(
            attn.q_proj, "weight", nn.Parameter(attn.q_proj.weight.detach().T.clone().T * 2)
        ),
        "data of the stored one": lambda attn: setattr(
            attn.q_proj.weight, "data", attn.q_proj.weight.data.T.clone().T * 2
        ),
        "set_": lambda attn: attn.q_proj.weight.set_(torch.randn_like(attn.q_proj.weight)),
    }

    @pytest.mark.parametrize("change", CHANGES)
    @torch.no_grad()
    def test_what_was_changed_runs(self, change):
        model, tokens = make_model("rotary"), random_tokens(2, 5)
        before = model(tokens)
        self.CHANGES[change](model.blocks[0].attn)
        assert not torch.allclose(model(tokens), before)
        torch.testing.assert_close(rebuilt(model)(tokens), model(tokens), rtol=1e-12, atol=1e-12)

    def test_other_sizes_are_refused(self):
        mlp = make_model("rotary").blocks[0].mlp
        with pytest.raises(ConfigError, match=r"W_in = \[12, 10\]: this network has \['d_model', 'd_mlp'\] \[12, 20\]"):
            mlp.W_in = mlp.W_in.detach()[:, ::2]
