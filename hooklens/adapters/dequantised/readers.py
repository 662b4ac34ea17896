"""The ways to quantise, each by its settings in a config."""

from collections.abc import Callable, Mapping
from typing import Any

from hooklens.adapters.dequantised.bnb import Bnb4Bit, Bnb8Bit
from hooklens.adapters.dequantised.packed import Awq, CompressedPacked, Gptq
from hooklens.adapters.dequantised.scaled import Mxfp4, Scaled
from hooklens.adapters.dequantised.settings import Settings
from hooklens.adapters.dequantised.tensors import QuantFormat
from hooklens.adapters.dequantised.torchao import TorchaoInt8
from hooklens.errors import UnsupportedModelError

_PACKED = "pack-quantized"
_PLAIN_SCALES = ("float-quantized", "int-quantized", "naive-quantized")


def _read_fp8(settings: Settings) -> QuantFormat:
    settings.choose("fmt", ("e4m3", "e5m2"), "e4m3")
    return Scaled("fp8", "weight_scale_inv", settings.block("weight_block_size"))


def _read_compressed(settings: Settings) -> QuantFormat:
    is_packed = settings.choose("format", (*_PLAIN_SCALES, _PACKED), "missing") == _PACKED
    sparsity = settings.get("sparsity_config", {})
    if sparsity and not (isinstance(sparsity, Mapping) and sparsity.get("format", "dense") == "dense"):
        settings.reject("sparsity_config", sparsity, "none, or a dense one")
    groups = settings.get("config_groups", {})
    blocks, bits, zeros = set(), set(), set()
    if not isinstance(groups, Mapping):
        settings.reject("config_groups", groups, "an object")
        groups = {}
    for name, group in groups.items():
        described = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(described, Mapping):
            settings.reject(f"config_groups.{name}", group, "an object that describes weights")
            continue
        weights = Settings(described)
        strategies = ("tensor", "channel", "group") if is_packed else ("tensor", "channel", "group", "block")
        strategy = weights.choose("strategy", strategies, "tensor")
        if is_packed:
            bits.add(weights.choose("num_bits", (4, 8), 8))
            zeros.add(weights.choose("symmetric", (True, False), default=True) is False)
        blocks.add(
            weights.block("block_structure") if strategy == "block"
            else (1, weights.group_size()) if strategy == "group"
            else None
        )  # fmt: skip
        settings.problems += [f"config_groups.{name}.weights.{problem}" for problem in weights.problems]
    if len(blocks) > 1:
        settings.reject("config_groups", groups, "blocks of one size")
    if len(bits) > 1:
        settings.reject("config_groups", groups, "numbers of as many bits")
    if is_packed:
        block = next(iter(blocks), None)
        return CompressedPacked(next(iter(bits), 8), -1 if block is None else block[1], has_zeros=zeros == {True})
    return Scaled("compressed-tensors", "weight_scale", next(iter(blocks), None))


def _read_mxfp4(settings: Settings) -> QuantFormat:
    return Mxfp4()


def _read_gptq(settings: Settings) -> QuantFormat:
    bits = settings.choose("bits", (4, 8), 4)
    version = settings.choose("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return Gptq(bits, settings.group_size(), zeros_less_one=version == "gptq")


def _read_awq(settings: Settings) -> QuantFormat:
    settings.choose("bits", (4,), settings.get("w_bit", 4))
    version = settings.get("version", "gemm")
    if str(version).lower() != "gemm":
        settings.reject("version", version, "'gemm'")
    if settings.get("zero_point", default=True) is not True:
        settings.reject("zero_point", settings.get("zero_point", None), "true")
    return Awq(settings.group_size(default=settings.group_size("q_group_size")))


def _read_bitsandbytes(settings: Settings) -> QuantFormat:
    in_4bit = settings.get("load_in_4bit", False) or settings.get("_load_in_4bit", False)
    return Bnb4Bit() if in_4bit else Bnb8Bit()


def _read_torchao(settings: Settings) -> QuantFormat:
    described = settings.get("quant_type", {})
    default = described.get("default") if isinstance(described, Mapping) else None
    kind = default.get("_type") if isinstance(default, Mapping) else described
    if kind != "Int8WeightOnlyConfig":
        settings.reject("quant_type", kind, "Int8WeightOnlyConfig")
    return TorchaoInt8()


METHODS: Mapping[str, Callable[[Settings], QuantFormat]] = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed,
    "mxfp4": _read_mxfp4,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "bitsandbytes": _read_bitsandbytes,
    "torchao": _read_torchao,
}


def read_scheme(method: str, described: Mapping[str, Any], *, where: str) -> QuantFormat:
    """How weights are quantised.

    Args:
        method: one of the known ways.
        described: its settings.
        where: what to call them in texts of errors.

    Raises:
        UnsupportedModelError: settings that are not implemented; all are listed.
    """
    settings = Settings(described)
    scheme = METHODS[method](settings)
    if settings.problems:
        raise UnsupportedModelError(
            f"{where}: weights that HookLens cannot dequantise ({method}): {'; '.join(settings.problems)}. Take the "
            "checkpoint that was quantised"
        )
    return scheme
