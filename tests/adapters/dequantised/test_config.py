"""What a config says of quantisation: which format, or why not."""

import pytest

from hooklens.adapters.dequantised import read_quantisation
from hooklens.adapters.dequantised.bnb import Bnb4Bit, Bnb8Bit
from hooklens.adapters.dequantised.packed import Awq, CompressedPacked, Gptq
from hooklens.adapters.dequantised.scaled import Mxfp4, Scaled
from hooklens.errors import UnsupportedModelError

_GROUP = {"weights": {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 32}}
_PACKED = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": False}}
_ROWS = {"weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}}
_BLOCK = {"weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 64]}}


@pytest.mark.parametrize(
    ("described", "scheme"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Gptq(8, -1)),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"}, Gptq(4, 128, zeros_less_one=False)),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "version": "GEMM"}, Awq(64)),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Scaled("fp8", "weight_scale_inv", (128, 128))),
        ({"quant_method": "fp8", "weight_block_size": None}, Scaled("fp8", "weight_scale_inv", None)),
        (
            {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": _GROUP}},
            Scaled("compressed-tensors", "weight_scale", (1, 32)),
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": _BLOCK}},
            Scaled("compressed-tensors", "weight_scale", (128, 64)),
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": _PACKED}},
            CompressedPacked(4, 32, has_zeros=True),
        ),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": _ROWS}},
            CompressedPacked(8, -1),
        ),
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_formats(described, scheme, key) -> None:
    config = {"model_type": "llama", key: described}
    plain, found = read_quantisation(config, where="here")
    assert plain == {"model_type": "llama"}
    assert (type(found), vars(found)) == (type(scheme), vars(scheme))


@pytest.mark.parametrize(
    ("described", "kind"),
    [
        ({"quant_method": "mxfp4"}, Mxfp4),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, Bnb4Bit),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Bnb8Bit),
        ({"load_in_4bit": True}, Bnb4Bit),
    ],
)
def test_formats_without_settings(described, kind) -> None:
    plain, scheme = read_quantisation({"quantization_config": described}, where="here")
    assert plain == {}
    assert isinstance(scheme, kind)


def test_a_language_model_inside_of_another() -> None:
    described = {"quant_method": "awq", "bits": 4, "group_size": 32}
    config = {"model_type": "outer", "text_config": {"model_type": "llama", "quantization_config": described}}
    plain, scheme = read_quantisation(config, where="here")
    assert plain == {"model_type": "outer", "text_config": {"model_type": "llama"}}
    assert isinstance(scheme, Awq)
    assert scheme.group_size == 32


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"quantization_config": None},
        {"quantization_config": {"quant_method": "hqq"}},
        {"quantization_config": "gptq"},
        {"quantization_config": {"quant_method": ["gptq"]}},
        {"quantization_config": {"bits": 4}},
        {"quantization": {"bits": 4, "group_size": 64}, "quantization_config": {"quant_method": "gptq"}},
        {"text_config": {"quantization_config": {"quant_method": "hqq"}}},
    ],
)
def test_what_is_plain_or_not_known_is_left_as_it_is(config) -> None:
    assert read_quantisation(config, where="here") == (config, None)


@pytest.mark.parametrize(
    ("described", "problems"),
    [
        ({"quant_method": "gptq", "bits": 3, "group_size": 0}, ["bits is 3; expected 4 or 8", "group_size is 0; "]),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            ["checkpoint_format is 'marlin'; expected 'gptq' or"],
        ),
        ({"quant_method": "awq", "version": "gemv", "zero_point": False}, ["version is 'gemv'", "zero_point is False"]),
        ({"quant_method": "awq", "bits": 4.0}, ["bits is 4.0; expected 4"]),
        ({"quant_method": "fp8", "weight_block_size": [128]}, ["weight_block_size is [128]; expected two whole"]),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24", "sparsity_config": {"format": "sparse"}},
            ["format is 'marlin-24'; expected 'float-quantized'", "sparsity_config is"],
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "sparsity_config": 3,
                "config_groups": {"a": 5, "b": {"weights": None}},
            },
            ["sparsity_config is 3; expected none", "config_groups.a is 5; expected an object", "config_groups.b is {"],
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": _PACKED, "b": _ROWS, "c": {"weights": {"num_bits": 3, "strategy": "block"}}},
            },
            ["c.weights.num_bits is 3", "c.weights.strategy is 'block'", "expected numbers of as many bits"],
        ),
        (
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": [1]},
            ["config_groups is [1]; expected an object"],
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "float-quantized",
                "config_groups": {"a": _GROUP, "b": {"weights": {"strategy": "block", "block_structure": 3}}},
            },
            ["config_groups.b.weights.block_structure is 3", "config_groups is"],
        ),
    ],
)
def test_settings_that_are_not_implemented(described, problems) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"config.json: quantization_config: weights that HookLens cannot"
    ) as caught:
        read_quantisation({"quantization_config": described}, where="here")
    assert [problem for problem in problems if problem not in str(caught.value)] == []
