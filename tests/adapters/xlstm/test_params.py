"""Tests of hooklens.adapters.xlstm.params: the logits of xlstm-jax, and what is refused."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hooklens as hl
from hooklens.errors import CheckpointError, ConfigError, InputError, UnsupportedModelError
from tests.adapters import xlstm_reference as reference

DATA = Path(__file__).parents[1] / "data"
SIZES = {"vocab_size": 61, "embedding_dim": 64, "num_blocks": 2, "head_dim": 16}
SMALL = {"vocab_size": 11, "embedding_dim": 12, "num_blocks": 2, "head_dim": 4, "ffn_multiple_of": 4}


@dataclass
class Box:
    """As `flax.linen.Partitioned` holds an array."""

    value: Any
    names: tuple[str | None, ...] = (None,)


def load_stored(variant: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, torch.Tensor], np.ndarray]:
    """Parameters, config, call and logits that xlstm-jax computed."""
    stored = np.load(DATA / f"xlstm_llama_{variant}.npz")
    # The variant with documents has the parameters of the plain one.
    weights = np.load(DATA / "xlstm_llama_base.npz") if variant == "doc" else stored
    params = {name: weights[name] for name in weights.files if name.startswith("params/")}
    call = {"input": torch.from_numpy(stored["ids"])}
    if variant == "doc":
        call["positions"] = torch.from_numpy(stored["call/pos_idx"])
        call["document_borders"] = torch.from_numpy(stored["call/document_borders"])
    return params, {**SIZES, **json.loads(bytes(stored["config"]))}, call, stored["logits"]


@pytest.mark.parametrize("variant", ["base", "doc", "qknorm_bias"])
def test_logits_are_those_that_xlstm_jax_computed(variant):
    params, config, call, logits = load_stored(variant)
    model = hl.HookedCausalLM.from_xlstm(params, config)
    # 2e-5: float32 on both sides, logits up to 6.
    np.testing.assert_allclose(model(**call).detach().numpy(), logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["base", "doc", "qknorm_bias"])
def test_the_reference_computes_what_xlstm_jax_did(variant):
    """The reference speaks for xlstm-jax on options that nothing is stored of: it has to agree where something is."""
    params, config, call, logits = load_stored(variant)
    named = {"pos_idx": call.get("positions"), "document_borders": call.get("document_borders")}
    arrays = {name: None if tensor is None else tensor.numpy() for name, tensor in named.items()}
    found = reference.run(params, config, call["input"].numpy(), **arrays)
    np.testing.assert_allclose(found, logits, rtol=0, atol=2e-5)


CONFIGS = st.fixed_dictionaries(
    {
        "vocab_size": st.just(11),
        "num_blocks": st.integers(1, 2),
        "qk_norm": st.booleans(),
        "causal": st.booleans(),
        "theta": st.sampled_from([1e4, 50.0, 7]),
        "ffn_multiple_of": st.sampled_from([1, 4, 7]),
        "ffn_dim_multiplier": st.sampled_from([None, 0, 1.0, 1.3, 0.5]),
        "use_bias": st.booleans(),
        "mask_across_document_boundaries": st.booleans(),
        "logits_soft_cap": st.sampled_from([None, "None", 2.0, 30]),
    }
)


@settings(max_examples=50)
@given(
    config=CONFIGS,
    heads=st.sampled_from([(1, 4), (3, 2), (2, 6), (4, 4)]),
    layout=st.sampled_from(["flat", "dots", "tree", "bare", "boxed", "stacked"]),
    positions=st.sampled_from([None, "restart", "spread"]),
    says_borders=st.booleans(),
    seed=st.integers(0, 10**6),
)
@torch.no_grad()
def test_logits_are_the_references_over_all_options(config, heads, layout, positions, says_borders, seed):
    config = {**config, "embedding_dim": heads[0] * heads[1], "head_dim": heads[1]}
    plain = {**config, "logits_soft_cap": None if config["logits_soft_cap"] == "None" else config["logits_soft_cap"]}
    params = reference.draw_params(plain, seed)
    rng = np.random.default_rng(seed)
    ids, borders = rng.integers(0, 11, (2, 7)), rng.random((2, 7)) < 0.3
    borders[:, 0] = True
    pos_idx = None
    if positions == "spread":
        pos_idx = np.sort(rng.integers(0, 40, (2, 7)), 1)
    elif positions == "restart":
        starts = np.where(borders, np.arange(7), 0)
        pos_idx = np.arange(7) - np.maximum.accumulate(starts, 1)
    expected = reference.run(params, plain, ids, pos_idx, borders if says_borders else None)
    model = hl.HookedCausalLM.from_xlstm(lay_out(params, layout), config)
    call = {"document_borders": torch.from_numpy(borders)} if says_borders else {}
    if positions is not None:
        call["positions"] = torch.from_numpy(pos_idx)
    found = model(torch.from_numpy(ids), **call).numpy()
    # 1e-5: rotary angles, up to 40, are made in float32, and all else in float64.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * max(1.0, np.abs(expected).max()))


def lay_out(params, layout):
    """The parameters in one of the ways in which programs keep them."""
    if layout == "dots":
        return {name.replace("/", "."): array for name, array in params.items()}
    if layout == "tree":
        return reference.nest(params)
    if layout == "bare":
        return reference.nest(params)["params"]
    if layout == "boxed":
        return {tuple(name.split("/")): Box(array) for name, array in params.items()}
    return reference.stack_blocks(params) if layout == "stacked" else params


def flatten(tree, path=""):
    if not isinstance(tree, dict):
        return {path: tree}
    return {
        name: array for key, one in tree.items() for name, array in flatten(one, f"{path}/{key}".lstrip("/")).items()
    }


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_the_tree_comes_back_bit_for_bit(stacked, dtype):
    config = {**SMALL, "qk_norm": True, "use_bias": True}
    params = reference.draw_params(config, 3, dtype)
    params = reference.stack_blocks(params) if stacked else params
    model = hl.HookedCausalLM.from_xlstm(params, config)
    assert str(model.dtype) == f"torch.{dtype}"
    written = flatten(model.to_xlstm())
    assert written.keys() == params.keys()
    for name, array in written.items():
        # Of float16 every number is one of float32.
        assert array.dtype == ("float64" if dtype == "float64" else "float32")
        np.testing.assert_array_equal(array, params[name])
    assert model.cfg.to_xlstm()["scan_blocks"] is stacked
    again = hl.HookedCausalLM.from_xlstm(model.to_xlstm(), model.cfg.to_xlstm(), dtype=model.dtype)
    assert again.cfg == model.cfg
    for name, weight in model.named_weights().items():
        assert torch.equal(weight, again.named_weights()[name])


def test_what_is_written_and_read_shares_no_memory():
    params = reference.draw_params(SMALL, 3, "float32")
    model = hl.HookedCausalLM.from_xlstm(params, SMALL)
    before = {name: array.copy() for name, array in params.items()}
    written = model.to_xlstm()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for name, array in flatten(written).items():
        np.testing.assert_array_equal(array, before[name])
        np.testing.assert_array_equal(params[name], before[name])


@pytest.mark.parametrize("held_as", ["ml_dtypes", "bits", "loaded", "tensors"])
def test_bfloat16_arrays_of_every_kind(held_as):
    params = reference.draw_params(SMALL, 1, "float32")
    expected = {name: torch.from_numpy(array).bfloat16() for name, array in params.items()}
    given: dict[str, Any] = dict(expected)
    if held_as == "ml_dtypes":
        bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
        given = {name: array.astype(bfloat16) for name, array in params.items()}
    elif held_as == "bits":
        given = {name: tensor.view(torch.uint16).numpy() for name, tensor in expected.items()}
    elif held_as == "loaded":
        # As numpy reads back what it has no word for.
        given = {name: tensor.view(torch.uint16).numpy().view("V2") for name, tensor in expected.items()}
    model = hl.HookedCausalLM.from_xlstm(given, SMALL)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.W_E, expected["params/token_embedding/sharded/embedding"][0])
    assert torch.equal(model.unembed.W_U, expected["params/lm_head/out_dense/kernel"])
    whole = hl.HookedCausalLM.from_xlstm(given, SMALL, dtype=torch.float32)
    assert torch.equal(whole.W_E, model.W_E.float())


def test_all_that_is_wrong_with_the_parameters_is_said_at_once():
    params = reference.draw_params(SMALL, 1, "float32")
    del params["params/lm_head/out_norm/scale"]
    params["params/lm_head/out_dense/bias"] = np.zeros(11, np.float32)
    params["params/block_stack/block_1/attn/attn/dense_q/kernel"] = np.zeros((12, 4, 3), np.float32)
    params["params/block_stack/block_0/ffn/pre_norm/scale"] = np.zeros(12, np.int32)
    params["params/block_stack/block_0/attn/pre_norm/scale"] = [1.0] * 12
    params["params/block_stack/block_1/attn/pre_norm/scale"] = np.zeros(12, np.float64)
    with pytest.raises(CheckpointError) as error:
        hl.HookedCausalLM.from_xlstm(params, SMALL)
    assert str(error.value) == (
        "the parameters do not go with their xlstm-jax config: missing: 'lm_head/out_norm/scale'. "
        "unexpected: 'lm_head/out_dense/bias'. of another shape than the config says: "
        "'block_stack/block_1/attn/attn/dense_q/kernel' is [12, 4, 3], expected [12, 3, 4]. no floating-point numbers: "
        "'block_stack/block_0/attn/pre_norm/scale' is [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]; "
        "'block_stack/block_0/ffn/pre_norm/scale' is int32. of several dtypes "
        "('token_embedding/sharded/embedding' is float32, 'block_stack/block_1/attn/pre_norm/scale' is float64); bring "
        "all to one. Check that they belong together"
    )


def test_parameters_of_other_blocks_or_under_two_names_are_refused():
    params = reference.draw_params(SMALL, 1)
    stacked = reference.stack_blocks(params)
    with pytest.raises(
        CheckpointError, match=r"'block_stack/block/ffn/pre_norm/scale' is \[2, 12\], expected \[3, 12\]"
    ):
        hl.HookedCausalLM.from_xlstm(stacked, {**SMALL, "num_blocks": 3})
    with pytest.raises(CheckpointError, match=r"unexpected: 'block_stack/block_1/"):
        hl.HookedCausalLM.from_xlstm(params, {**SMALL, "num_blocks": 1})
    with pytest.raises(CheckpointError, match=r"unexpected: 'block_stack/block_0/"):
        hl.HookedCausalLM.from_xlstm({**params, **stacked}, SMALL)
    doubled = {**params, "lm_head/out_norm/scale": params["params/lm_head/out_norm/scale"]}
    with pytest.raises(CheckpointError, match="under two names: 'lm_head/out_norm/scale'"):
        hl.HookedCausalLM.from_xlstm(doubled, SMALL)
    with pytest.raises(InputError, match="params is 3, expected arrays by name"):
        hl.HookedCausalLM.from_xlstm(3, SMALL)
    with pytest.raises(CheckpointError, match=r"missing: .* and 1 more"):
        hl.HookedCausalLM.from_xlstm({}, SMALL)
    with pytest.raises(ConfigError, match="vocab_size is missing"):
        hl.HookedCausalLM.from_xlstm(params, {"embedding_dim": 12, "num_blocks": 2, "head_dim": 4})


def test_a_network_that_xlstm_jax_has_not_is_not_written():
    model = hl.HookedCausalLM.from_xlstm(reference.draw_params(SMALL, 1), SMALL)
    other = hl.HookedCausalLM(model.cfg.replace(act_fn="relu"))
    with pytest.raises(UnsupportedModelError, match=r"describes this network: act_fn='relu' \(there 'silu'\). Change"):
        other.to_xlstm()


@torch.no_grad()
def test_processed_weights_are_written_too():
    """Folded norms still have weights, of ones, so that xlstm-jax has a place for them."""
    params, ids = reference.draw_params(SMALL, 1), torch.tensor([[1, 5, 2, 2]])
    model = hl.HookedCausalLM.from_xlstm(params, SMALL)
    written = flatten(model.process_weights(fold_ln=True).to_xlstm())
    np.testing.assert_array_equal(written["params/block_stack/block_0/attn/pre_norm/scale"], np.ones(12))
    found = reference.run(written, SMALL, ids.numpy())
    # 1e-6: rotary angles are made in float32.
    np.testing.assert_allclose(found, model(ids).numpy(), rtol=0, atol=1e-6)
