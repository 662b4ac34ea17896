"""Whole checkpoints, quantised by the tests and loaded: against the plain ones that they stand for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hooklens import HookedCausalLM, is_supported
from hooklens.adapters import open_checkpoint
from hooklens.adapters.dequantised.packed import Gptq
from hooklens.errors import CheckpointError
from tests.adapters.dequantised.packing import awq_state, gptq_state, open_tensors, scaled_state
from tests.adapters.families.checks import save
from tests.checkpoints import edit_config, load_apart, save_variant

Quantise = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]
IDS = torch.arange(3, 14)[None]


def _of_gptq(bits: int, group_size: int) -> Quantise:
    def quantise(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        d_out, d_in = weight.shape
        state, exact = gptq_state(name, d_in, d_out, bits=bits, group_size=group_size, seed=len(name))
        return {**state, f"{name}.bias": torch.zeros(d_out)}, exact

    return quantise


def _of_awq(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return awq_state(name, weight.shape[1], weight.shape[0], group_size=8, seed=len(name))


def _of_fp8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return scaled_state(name, weight, scale="weight_scale_inv", block=(16, 16))


def _of_compressed(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return scaled_state(name, weight, scale="weight_scale", block=(1, weight.shape[1]))


def _of_int8(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scales = weight.abs().amax(1)
    entries = (weight / scales[:, None] * 127).round().to(torch.int8)
    rows = [[int(q) * float(scale) / 127 for q in row] for row, scale in zip(entries, scales, strict=True)]
    return {f"{name}.weight": entries, f"{name}.SCB": scales}, torch.tensor(rows, dtype=torch.float64)


_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
_CHANNELS = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}
FORMATS: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "gptq 4": (_of_gptq(4, 16), {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True, "sym": False}),
    "gptq 8": (_of_gptq(8, 8), {"quant_method": "gptq", "bits": 8, "group_size": 8, "checkpoint_format": "gptq"}),
    "awq": (_of_awq, {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "zero_point": True}),
    "fp8": (_of_fp8, _BLOCKS),
    "compressed-tensors": (_of_compressed, _CHANNELS),
    "bitsandbytes": (_of_int8, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}),
    "old bitsandbytes": (_of_int8, {"load_in_8bit": True, "llm_int8_threshold": 6.0}),
}


def save_quantised(folder: Path, name: str) -> tuple[Path, Path]:
    """A tiny Llama quantised, and the plain one that it stands for, in float64."""
    quantise, described = FORMATS[name]
    quantised, plain = save_variant("llama-gqa", folder / "quantised"), folder / "plain"
    shutil.copytree(quantised, plain)
    ours, exact = {}, {}
    for key, value in load_apart(quantised / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            state, weight = quantise(key.removesuffix(".weight"), value)
            ours |= state
            exact[key] = weight.contiguous()
        else:
            ours[key], exact[key] = value, value.double()
    save_file(ours, quantised / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    edit_config(quantised, quantization_config=described)
    edit_config(plain, dtype="float64")
    return quantised, plain


@pytest.mark.parametrize("name", FORMATS)
def test_a_quantised_checkpoint_is_the_plain_one(tmp_path, name) -> None:
    """Loaded in both dtypes, some layers of it, and saved: plain weights, which transformers loads."""
    quantised, plain = save_quantised(tmp_path, name)
    assert is_supported(quantised)
    model = HookedCausalLM.from_pretrained(quantised)
    expected = HookedCausalLM.from_pretrained(plain, dtype="float32")
    assert model.cfg == expected.cfg
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=2**-22, atol=0.0)
    half = HookedCausalLM.from_pretrained(quantised, dtype="bfloat16", layers=[1])
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half.W_in[0].float(), expected.W_in[1], rtol=2**-8, atol=0.0)

    model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), reference(IDS).logits, rtol=0.0, atol=2e-5)


def test_float8_as_transformers_dequantises_it(tmp_path) -> None:
    """transformers dequantises on a machine without a GPU that multiplies float8."""
    quantised, _ = save_quantised(tmp_path, "fp8")
    reference = AutoModelForCausalLM.from_pretrained(quantised, dtype=torch.float32)
    plain = {name: value for name, value in reference.state_dict().items() if name.endswith("_proj.weight")}
    assert {value.dtype for value in plain.values()} == {torch.float32}
    checkpoint = open_checkpoint(quantised)
    for name, value in plain.items():
        assert torch.equal(checkpoint._model._source.read(name), value), name  # type: ignore[attr-defined]


def test_conv1d_checkpoints(tmp_path) -> None:
    """GPT-2 as GPTQ stores it: maps as those of `nn.Linear`, square ones, too."""
    config = {"vocab_size": 31, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 4}
    quantised, plain = save(tmp_path / "quantised", "gpt2", **config), tmp_path / "plain"
    shutil.copytree(quantised, plain)
    ours, exact = {}, {}
    for key, value in load_apart(quantised / "model.safetensors").items():
        if key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            base, (d_in, d_out) = key.removesuffix(".weight"), value.shape
            state, weight = gptq_state(base, d_in, d_out, bits=4, group_size=16, seed=len(key))
            ours |= state
            exact[key] = weight.T.float().contiguous()
        else:
            ours[key] = exact[key] = value
    save_file(ours, quantised / "model.safetensors")
    save_file(exact, plain / "model.safetensors")
    edit_config(quantised, quantization_config=FORMATS["gptq 4"][1])
    model = HookedCausalLM.from_pretrained(quantised)
    reference = AutoModelForCausalLM.from_pretrained(plain, attn_implementation="sdpa")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), reference(IDS).logits, rtol=0.0, atol=2e-5)


def test_experts_of_mxfp4_as_transformers_loads_them(tmp_path) -> None:
    """gpt-oss as it is published; transformers dequantises it on a machine without a GPU."""
    config = {
        "vocab_size": 31, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12,
        "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 3, "num_experts_per_tok": 2,
    }  # fmt: skip
    save(tmp_path, "gpt_oss", **config)
    generator = torch.Generator().manual_seed(0)
    ours = {}
    for key, value in load_apart(tmp_path / "model.safetensors").items():
        if key.endswith(("gate_up_proj", "down_proj")):
            n_experts, d_in, d_out = value.shape
            shape = (n_experts, d_out, d_in // 32)
            ours[f"{key}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            ours[f"{key}_scales"] = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
        else:
            ours[key] = value
    save_file(ours, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    model = HookedCausalLM.from_pretrained(tmp_path, dtype="float32")
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    # transformers before 5.23 makes bfloat16 of experts, which holds them exactly, whatever dtype is asked for.
    reference = reference.float()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), reference(IDS).logits, rtol=0.0, atol=2e-5)


def test_conv1d_weights_are_turned() -> None:
    """Quantised maps are stored as those of `nn.Linear`, whatever the plain checkpoint does, but for the head."""
    state, weight = gptq_state("h.mlp", 32, 8, bits=4, group_size=32)
    head, of_head = gptq_state("head", 32, 8, bits=4, group_size=32, seed=7)
    read = open_tensors(state | head, Gptq(4, 32), conv1d=True)
    assert read.header("h.mlp.weight").shape == (32, 8)
    torch.testing.assert_close(read.read("h.mlp.weight").double(), weight.T, rtol=2**-24, atol=0.0)
    torch.testing.assert_close(read.read("head.weight").double(), of_head, rtol=2**-24, atol=0.0)


def test_a_config_that_says_quantised_of_plain_weights(tmp_path) -> None:
    edit_config(save_variant("llama-gqa", tmp_path), quantization_config=FORMATS["awq"][1])
    with pytest.raises(
        CheckpointError, match=r"quantised \(awq\), and none is: no name ends with '.qweight'. Take quan"
    ):
        HookedCausalLM.from_pretrained(tmp_path)


def test_biases_that_are_no_padding_are_refused(tmp_path) -> None:
    quantised, _ = save_quantised(tmp_path, "gptq 4")
    tensors = load_apart(quantised / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.bias"
    tensors[name] = tensors[name] + 1
    save_file(tensors, quantised / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"unexpected tensors: '{name}'\."):
        HookedCausalLM.from_pretrained(quantised)
