"""`from_pretrained(..., quantize="keep")`: the very numbers of the plain model, made of what the checkpoint holds.

Tiny checkpoints whose maps are random numbers of few bits and scales, packed by `packing.py` in the published layouts.
"""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from hooklens import HookedCausalLM, verify
from hooklens.errors import TransformError, UnsupportedModelError
from hooklens.model.parts.quantised import quantised_maps
from hooklens.model.parts.scaled import ScaledLinear
from tests.adapters.dequantised.packing import awq_state, compressed_state, gptq_state, scaled_state
from tests.checkpoints import D_VOCAB, _llama, _neox, _randomise
from tests.quantised_models import bytes_held

_LAYERS = {
    "vocab_size": D_VOCAB,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
# Maps in tensors of their own; queries, keys and values in one; the other way round; experts; latents, whose maps are
# taken apart by heads and pieces, beside experts.
MODELS = {
    "apart": lambda: _llama(0, **_SIZES),
    "fused": lambda: _neox(0, **_SIZES),
    "turned": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=D_VOCAB, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
    ),
    "experts": lambda: MixtralForCausalLM(
        MixtralConfig(
            **_LAYERS, hidden_size=32, intermediate_size=64, num_key_value_heads=2, num_local_experts=3,
            num_experts_per_tok=2, pad_token_id=None,
        )
    ),
    "latents": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **{**_LAYERS, "num_hidden_layers": 2}, hidden_size=32, intermediate_size=64, moe_intermediate_size=32,
            num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, n_group=2, topk_group=1,
            num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=32, kv_lora_rank=24, qk_rope_head_dim=8,
            qk_nope_head_dim=16, v_head_dim=16, max_position_embeddings=64, pad_token_id=None,
        )
    ),
}  # fmt: skip
COUNTS = {"apart": 7, "fused": 6, "turned": 6, "experts": 4 + 9, "latents": None}
TOKENS = torch.randint(D_VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
# float32 logits of some ten, of two orders of the same sums.
CLOSE = {"rtol": 5e-5, "atol": 5e-5}


def _gptq(bits, **settings):
    def make(name, weight, seed):
        size = settings.get("group_size", 16)
        state, _ = gptq_state(name, *weight.T.shape, bits=bits, group_size=size, seed=seed)
        if not settings.get("desc_act"):
            del state[f"{name}.g_idx"]
        return state

    return make, {"quant_method": "gptq", "bits": bits, "group_size": 16, **settings}


def _scaled(scale, block, dtype=torch.float8_e4m3fn, **settings):
    def make(name, weight, seed):
        size = block or (1, weight.shape[1])
        return scaled_state(name, weight, scale=scale, block=size, dtype=dtype)[0]

    return make, settings


def _packed(bits, *, zeros, **options):
    def make(name, weight, seed):
        d_out, d_in = weight.shape
        return compressed_state(name, d_in, d_out, bits=bits, group_size=8, zeros=zeros, seed=seed, **options)[0]

    settings = {"num_bits": bits, "group_size": 8, "symmetric": not zeros}
    return make, _compressed("group", "pack-quantized", **settings)


def _compressed(strategy, form="int-quantized", **weights):
    described = {"num_bits": 8, "type": "int", "strategy": strategy, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": {"weights": described}},
    }


FORMATS = {
    "gptq of 4 bits": _gptq(4),
    "gptq, inputs in any order of groups": _gptq(4, desc_act=True),
    "gptq of 8 bits, a last group of its own": _gptq(8, group_size=24),
    "awq": (
        lambda name, weight, seed: awq_state(name, *weight.T.shape, group_size=8, seed=seed)[0],
        {"quant_method": "awq", "bits": 4, "group_size": 8},
    ),
    "fp8 in blocks": _scaled("weight_scale_inv", (24, 20), quant_method="fp8", weight_block_size=[24, 20]),
    "fp8 of a wider range": _scaled(
        "weight_scale_inv", (16, 16), torch.float8_e5m2, quant_method="fp8", fmt="e5m2", weight_block_size=[16, 16]
    ),
    "compressed, groups": _scaled("weight_scale", (1, 8), torch.int8, **_compressed("group", group_size=8)),
    "compressed, 4 bits packed": _packed(4, zeros=False),
    "compressed, 4 bits packed around zero points": _packed(4, zeros=True, shuffled=True),
    "compressed, 8 bits packed": _packed(8, zeros=True),
    "compressed, rows": _scaled("weight_scale", None, torch.int8, **_compressed("channel")),
}
# Blocks of AWQ's words are eight outputs; a router of Mixtral's has four.
_PLAIN = ("embed", "wte", "wpe", "lm_head", ".gate.", "norm", "ln_")


def quantise_folder(folder, make, described):
    """Put numbers of few bits in the place of a folder's maps; scales are small, so that activations stay near 1."""
    tensors, config = {}, json.loads((folder / "config.json").read_text())
    for seed, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        if tensor.ndim != 2 or any(word in name for word in _PLAIN):
            tensors[name] = tensor.clone()
            continue
        weight = tensor.T if config["model_type"] == "gpt2" else tensor
        state = make(name.removesuffix(".weight"), weight.contiguous(), seed)
        for own, one in state.items():
            tensors[own] = one / 16 if own.endswith(".scales") else one
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": described}))


def save(model, folder):
    _randomise(model, 0).save_pretrained(folder)
    return folder


# Every model in one, and every format of one; the others are slow.
_ALL_MODELS, _ALL_FORMATS = "gptq, inputs in any order of groups", "fused"


@pytest.mark.parametrize(
    ("way", "name"),
    [
        pytest.param(way, name, marks=() if way == _ALL_MODELS or name == _ALL_FORMATS else pytest.mark.slow)
        for way in FORMATS
        for name in MODELS
    ],
)
def test_kept_weights_are_those_of_the_plain_model(tmp_path, name, way) -> None:
    folder = save(MODELS[name](), tmp_path)
    quantise_folder(folder, *FORMATS[way])
    for dtype in (torch.bfloat16, torch.float32):
        kept, dense = (HookedCausalLM.from_pretrained(folder, quantize=how, dtype=dtype) for how in ("keep", None))
        maps = quantised_maps(kept)
        assert COUNTS[name] in (None, len(maps))
        if way != "compressed, rows":
            assert {type(linear) for linear in maps.values()} == {ScaledLinear}
        for weight, value in kept.named_weights().items():
            assert torch.equal(value, dense.named_weights()[weight]), weight
    torch.testing.assert_close(kept(TOKENS), dense(TOKENS), **CLOSE)


def test_experts_in_mxfp4(tmp_path) -> None:
    """gpt-oss as it is published: the experts of a layer in one tensor, whose rows alternate between gate and half."""
    config = GptOssConfig(
        **{**_LAYERS, "num_hidden_layers": 2}, hidden_size=64, head_dim=16, intermediate_size=32, num_local_experts=3,
        num_key_value_heads=2, num_experts_per_tok=2, max_position_embeddings=64, pad_token_id=None,
    )  # fmt: skip
    folder = save(GptOssForCausalLM(config), tmp_path)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, d_in, d_out = tensors.pop(name).shape
        shape = (n_experts, d_out, d_in // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(described))
    kept, dense = (HookedCausalLM.from_pretrained(folder, quantize=how, dtype=torch.float32) for how in ("keep", None))
    maps = quantised_maps(kept)
    assert len(maps) == 2 * 3 * 3
    assert all(".mlp." in name for name in maps)
    for weight, value in kept.named_weights().items():
        assert torch.equal(value, dense.named_weights()[weight]), weight
    torch.testing.assert_close(kept(TOKENS), dense(TOKENS), **CLOSE)
    # Half a byte a number, and two bytes for the scale of each 32.
    n_numbers = sum(linear.in_features * linear.out_features for linear in maps.values())
    assert sum(map(bytes_held, maps.values())) == n_numbers * (1 / 2 + 2 / 32)


@pytest.mark.parametrize("way", ["gptq of 4 bits", "awq"])
def test_numbers_of_4_bits_take_half_a_byte(tmp_path, way) -> None:
    folder = save(MODELS["fused"](), tmp_path)
    quantise_folder(folder, *FORMATS[way])
    model = HookedCausalLM.from_pretrained(folder, quantize="keep")
    size = FORMATS[way][1]["group_size"]
    for linear in quantised_maps(model).values():
        n_numbers = linear.in_features * linear.out_features
        assert bytes_held(linear) == n_numbers // 2 + math.ceil(n_numbers / size) * 3


def test_a_kept_model_is_hooked_and_read_as_any_other(tmp_path) -> None:
    folder = save(MODELS["experts"](), tmp_path)
    quantise_folder(folder, *FORMATS["gptq, inputs in any order of groups"])
    model = HookedCausalLM.from_pretrained(folder, quantize="keep")
    with pytest.raises(TransformError, match=r"13 linear maps are quantised \(uint4 with scales\)"):
        model.process_weights(fold_ln=True)
    plain = model.dequantize()
    assert not quantised_maps(plain)
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), **CLOSE)


@pytest.mark.slow
def test_verify_passes_on_a_kept_model(tmp_path) -> None:
    folder = save(MODELS["latents"](), tmp_path)
    quantise_folder(folder, *FORMATS["fp8 in blocks"])
    model = HookedCausalLM.from_pretrained(folder, quantize="keep")
    report = verify(model, dtypes=[torch.float32, torch.bfloat16], n_tokens=8, progress=False)
    assert report.passed, report
    assert not any("not recomputed" in note for note in report.notes)


class TestRefusals:
    def test_experts_of_which_some_are_plain(self, tmp_path) -> None:
        folder = save(MODELS["experts"](), tmp_path)
        plain = load_file(folder / "model.safetensors")
        name = next(name for name in plain if "experts.1.w1" in name)
        quantise_folder(folder, *FORMATS["awq"])
        tensors = load_file(folder / "model.safetensors")
        for ending in ("qweight", "qzeros", "scales"):
            del tensors[name.removesuffix("weight") + ending]
        save_file({**tensors, name: plain[name]}, folder / "model.safetensors", metadata={"format": "pt"})
        HookedCausalLM.from_pretrained(folder)
        with pytest.raises(UnsupportedModelError, match=r"experts\.1\.w1\.weight' is not quantised, and other experts"):
            HookedCausalLM.from_pretrained(folder, quantize="keep")

    def test_an_odd_number_of_inputs(self, tmp_path) -> None:
        folder = save(_llama(0, hidden_size=32, intermediate_size=63, num_hidden_layers=1), tmp_path)
        _, described = FORMATS["awq"]
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.0.mlp.down_proj"
        del tensors[f"{name}.weight"]
        state, _ = awq_state(name, 63, 32, group_size=21)
        save_file({**tensors, **state}, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {**described, "group_size": 21}
        (folder / "config.json").write_text(json.dumps(config))
        HookedCausalLM.from_pretrained(folder)
        with pytest.raises(UnsupportedModelError, match=r"down_proj\.weight': its 63 inputs are an odd number"):
            HookedCausalLM.from_pretrained(folder, quantize="keep")
