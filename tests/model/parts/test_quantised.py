"""Networks whose projections are quantised linear maps of torchao and bitsandbytes.

What such a network computes is held against the plain network of the weights that it says it has
(`model.dequantize()`), whose projections are `nn.Linear`: the same function, so in float32 they are apart by rounding.
"""

import copy
import importlib.metadata
import pickle

import pytest
import torch

from hooklens import HookedCausalLM, MoEConfig, patching
from hooklens.causal_lm import quantising
from hooklens.errors import CheckpointError, ConfigError, InputError, TransformError
from hooklens.model.parts.part import is_plain
from hooklens.model.parts.quantised import compute_dtype, dense_weight, is_quantised, quantised_maps
from hooklens.weights.quantised import package_of
from tests.model.networks import activations_of, random_tokens
from tests.quantised_models import KINDS, NETWORKS, bytes_held, plain, quantise, round_to_groups

PEFT = tuple(map(int, importlib.metadata.version("peft").split(".")[:2]))
# float32 sums of some hundred terms, in another order, of activations of some ten.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TOKENS = random_tokens(2, 6)


@pytest.fixture(scope="module", params=[(network, kind) for network in NETWORKS for kind in KINDS], ids=str)
def pair(request):
    """A quantised model and the plain one of its weights."""
    network, kind = request.param
    model = quantise(plain(network, dtype=torch.float32), kind)
    return model, model.dequantize()


@pytest.fixture(scope="module", params=KINDS)
def grouped(request):
    return quantise(plain("grouped", dtype=torch.float32), request.param)


def test_projections_are_quantised_and_nothing_else(pair) -> None:
    model, dense = pair
    maps = quantised_maps(model)
    # Of a mixture: attention's four, three of each of five experts, the shared expert's three.
    per_block = 4 + 5 * 3 + 3 if isinstance(model.cfg.mlp, MoEConfig) else 7 if model.cfg.gated_mlp else 6
    assert len(maps) == per_block * model.cfg.n_layers
    assert all(name.startswith("blocks.") for name in maps)
    assert not quantised_maps(dense)
    assert model.n_params_total == dense.n_params_total
    assert not any(linear.weight.requires_grad for linear in maps.values())
    assert not any(map(is_plain, maps.values()))


def test_every_activation_is_that_of_the_plain_network(pair) -> None:
    """Also those that take heads apart, on request."""
    model, dense = pair
    ours, cache = model.run_with_cache(TOKENS, names_filter=activations_of(model))
    theirs, expected = dense.run_with_cache(TOKENS, names_filter=activations_of(dense))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    assert list(cache) == list(expected)
    for name, tensor in cache.items():
        torch.testing.assert_close(tensor, expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
    # Watching changes nothing.
    assert torch.equal(ours, model(TOKENS))


def test_edits_and_gradients_are_those_of_the_plain_network(pair) -> None:
    model, dense = pair
    neurons = next(
        name for name in model.hook_points() if name.endswith(("0.mlp.hook_post", "0.mlp.experts.hook_post"))
    )
    for name in (
        "blocks.0.hook_q_input",
        "blocks.1.attn.hook_result",
        neurons,
        "blocks.1.attn.hook_z",
    ):
        scaled = [(name, lambda t, hook: t * torch.linspace(0.5, 1.5, t.shape[-1]))]
        edited = model.run_with_hooks(TOKENS, fwd_hooks=scaled)
        torch.testing.assert_close(edited, dense.run_with_hooks(TOKENS, fwd_hooks=scaled), **CLOSE)
        assert not torch.allclose(edited, model(TOKENS), **CLOSE)
    grads = [
        one.run_with_cache(TOKENS, return_type="loss", incl_bwd=True, names_filter=["resid_pre", "z", "post"])[1]
        for one in (model, dense)
    ]
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[1][name], **CLOSE)
    assert grads[0]["blocks.0.hook_resid_pre_grad"].abs().sum() > 0


def test_cached_generation(pair) -> None:
    model, dense = pair
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    cached = model.generate(TOKENS, **options)
    assert torch.equal(cached, model.generate(TOKENS, use_past_kv_cache=False, **options))
    prefix = model.prefill(TOKENS[:1])
    torch.testing.assert_close(
        model(TOKENS[1:], past_kv_cache=prefix), dense(torch.cat([TOKENS[:1], TOKENS[1:]], 1))[:, 6:], **CLOSE
    )


def test_weights_read_as_what_they_are_dequantised(pair) -> None:
    """A unit vector into a map gives a column of its weight: what is read is what is multiplied with."""
    model, _ = pair
    for linear in quantised_maps(model).values():
        columns = linear(torch.eye(linear.in_features)) - (0 if linear.bias is None else linear.bias)
        torch.testing.assert_close(columns.T, dense_weight(linear), rtol=1e-5, atol=1e-6)
    attn = model.blocks[0].attn
    assert torch.equal(model.W_Q[0], attn.W_Q)
    read = dense_weight(attn.q_proj).view(4, 16, 64).transpose(1, 2)
    assert torch.equal(attn.W_Q, read)
    mlp = model.blocks[1].mlp
    if isinstance(model.cfg.mlp, MoEConfig):
        written = torch.stack([dense_weight(linear).T for linear in mlp.out_maps.maps])
    else:
        written = dense_weight(mlp.out_proj).T
    assert torch.equal(model.named_weights()["blocks.1.mlp.W_out"], written)
    assert model.OV.AB.shape == (2, 4, 64, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_stand_side_by_side(kind) -> None:
    """Each as if it were quantised alone; router and gate stay plain, and nobody calls an expert that no token sees."""
    dense = plain("mixture", dtype=torch.float32)
    model = quantise(dense, kind)
    mlp, called = model.blocks[0].mlp, set()
    for name in ("router_proj", "shared.shared_gate_proj"):
        assert is_plain(mlp.get_submodule(name))
    assert torch.equal(mlp.gate_maps.bias, dense.blocks[0].mlp.gate_maps.bias)
    make = {
        "int8": lambda weight: quantising._make_int8(weight, torch.float32),
        "int4": lambda weight: quantising._make_int4(weight, torch.float32),
        "scaled": lambda weight: quantising._keep_scaled(round_to_groups(weight), torch.device("cpu"), torch.float32),
    }[kind]
    for expert, linear in enumerate(mlp.in_maps.maps):
        alone = make(dense.blocks[0].mlp.in_maps.weight[expert].detach().contiguous())
        assert torch.equal(mlp.W_in[expert], dense_weight(alone).T)
        linear.register_forward_pre_hook(lambda module, given, expert=expert: called.add(expert))
    _, cache = model.run_with_cache(TOKENS[:1, :2], names_filter="choice")
    assert called == set(cache["choice", 0].unique().tolist())
    assert len(called) < 5
    with pytest.raises(ConfigError, match=r"W_in = .*: the weight of in_maps is quantised"):
        mlp.W_in = torch.zeros_like(mlp.W_in)


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_go_through_quantised_experts(kind) -> None:
    mlp = quantise(plain("mixture", dtype=torch.float32), kind).blocks[0].mlp
    assert mlp(torch.zeros(0, 4, 64)).shape == (0, 4, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_hold_few_bytes(kind) -> None:
    """int8: a byte, and a scale and maybe a zero for each row (5 bytes); int4: half a byte, and a scale for each 64.

    Scaled: half a byte, and a float16 scale and a byte of a zero for each 16.
    """
    maps = quantise(plain("mixture", dtype=torch.float32), kind).blocks[0].mlp.in_maps.maps
    assert sum(map(bytes_held, maps)) <= 5 * 64 * {"int8": 64 + 5, "int4": 32 + 4, "scaled": 32 + 4 * 3}[kind]


def test_assigning_and_drawing_weights_is_refused(grouped) -> None:
    attn = grouped.blocks[0].attn
    with pytest.raises(ConfigError, match=r"W_Q = .*: the weight of q_proj is quantised.*model\.dequantize\(\)"):
        attn.W_Q = torch.zeros_like(attn.W_Q)
    with pytest.raises(InputError, match="initialize: the weights of 14 linear maps are quantised"):
        grouped.initialize(seed=0)


def test_processing_is_refused_and_goes_from_the_plain_weights(grouped) -> None:
    steps = {"fold_ln": True}
    with pytest.raises(
        TransformError, match=r"14 linear maps are quantised .*'blocks\.0\.attn\.q_proj' first.*dequantize"
    ):
        grouped.process_weights(**steps)
    processed = grouped.dequantize().process_weights(**steps)
    torch.testing.assert_close(processed(TOKENS).log_softmax(-1), grouped(TOKENS).log_softmax(-1), **CLOSE)


def test_state_dicts_are_refused(grouped) -> None:
    dense = grouped.dequantize()
    with pytest.raises(CheckpointError, match="load_state_dict: the weights of 14 linear maps are quantised"):
        grouped.load_state_dict(dense.state_dict())
    if any("torchao" in type(value).__module__ for value in grouped.state_dict().values()):
        for load in (dense.load_state_dict, lambda state: HookedCausalLM.from_state_dict(state, dense.cfg)):
            with pytest.raises(
                CheckpointError, match=r"weights given are quantised: 'blocks\.0\.attn\.q_proj\.weight'"
            ):
                load(grouped.state_dict())


def test_copies(grouped) -> None:
    logits = grouped(TOKENS)
    for copied in (copy.deepcopy(grouped), pickle.loads(pickle.dumps(grouped))):
        assert torch.equal(copied(TOKENS), logits)
        assert torch.equal(copied.W_Q, grouped.W_Q)
        assert len(quantised_maps(copied)) == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_dtype_is_computed_in_and_read(grouped, dtype) -> None:
    model = copy.deepcopy(grouped).to(dtype)
    logits, cache = model.run_with_cache(TOKENS)
    assert logits.dtype == model.W_Q.dtype == model.W_K.dtype == dtype
    _, expected = grouped.dequantize().to(dtype).run_with_cache(TOKENS)
    assert {name: tensor.dtype for name, tensor in cache.items()} == {
        name: tensor.dtype for name, tensor in expected.items()
    }
    assert torch.equal(model.W_Q, grouped.W_Q.to(dtype))
    assert {compute_dtype(linear) for linear in quantised_maps(model).values()} == {dtype}
    # Some ten roundings of 2^-8 on logits of some ten.
    assert (logits.float() - grouped(TOKENS)).abs().mean() < 0.05 * grouped(TOKENS).abs().mean()
    back = model.to(torch.float32)
    assert torch.equal(back.W_V, grouped.W_V)


def test_patching_sweeps(grouped) -> None:
    """Late starts read `W_O` of a layer whose heads have been written over."""
    clean, corrupted = random_tokens(1, 6, seed=3), random_tokens(1, 6, seed=4)
    metric = patching.LogitDiff(1, 2)
    found, expected = (
        patching.sweep(model, clean, corrupted, patching.grid("z", heads="all"), metric, progress=False)
        for model in (grouped, grouped.dequantize())
    )
    torch.testing.assert_close(found.values, expected.values, **CLOSE)


def test_a_network_that_its_owner_quantised() -> None:
    """torchao's own call on a model puts its tensors into plain linear maps, among them the unembedding."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    dense = plain("alibi", dtype=torch.float32)
    model = copy.deepcopy(dense)
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))
    assert is_quantised(model.unembed.proj)
    expected = quantise(dense, "int8")
    assert torch.equal(model.W_O, expected.W_O)
    torch.testing.assert_close(model(TOKENS), model.dequantize()(TOKENS), **CLOSE)
    _, cache = model.run_with_cache(TOKENS, names_filter="result")
    _, same = expected.run_with_cache(TOKENS, names_filter="result")
    torch.testing.assert_close(cache["result", 1], same["result", 1], **CLOSE)


def test_adapters_train_on_quantised_weights(grouped) -> None:
    import peft

    if package_of(grouped.blocks[0].attn.q_proj.weight) == "torchao" and PEFT < (0, 21):
        pytest.skip("earlier adapters beside torchao's weights ask how to quantise anew, which only transformers says")
    model = copy.deepcopy(grouped)
    stored = {name: dense_weight(linear) for name, linear in quantised_maps(model).items()}
    plain_logits = model(TOKENS).detach()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=True)
    adapted = peft.get_peft_model(model, config)
    torch.testing.assert_close(adapted(TOKENS), plain_logits, **CLOSE)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    step = torch.optim.SGD(trained, lr=1.0)
    losses = []
    for _ in range(4):
        loss = adapted(TOKENS, return_type="loss")
        losses.append(loss.item())
        step.zero_grad()
        loss.backward()
        step.step()
    assert losses[-1] < losses[0]
    _, cache = model.run_with_cache(TOKENS, names_filter="q")
    assert len(cache) == 2
    for name, weight in stored.items():
        linear = model.get_submodule(name)
        assert torch.equal(dense_weight(getattr(linear, "base_layer", linear)), weight)
