"""How a checkpoint is quantised, as its `config.json` says."""

from collections.abc import Callable, Mapping
from typing import Any

from hooklens.adapters.dequantised.bnb import Bnb4Bit, Bnb8Bit
from hooklens.adapters.dequantised.packed import Awq, Gptq
from hooklens.adapters.dequantised.scaled import Mxfp4, Scaled
from hooklens.adapters.dequantised.tensors import QuantFormat
from hooklens.adapters.keys.config_map import QUANTISATION_KEYS
from hooklens.arguments import show
from hooklens.errors import UnsupportedModelError

_INSIDE = "text_config"
# MLX's own.
_OTHERS = "quantization"
_PLAIN_SCALES = ("float-quantized", "int-quantized", "naive-quantized")


class _Settings:
    """The settings of one way to quantise; what is wrong with them is collected."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.problems: list[str] = []

    def get(self, key: str, default: Any) -> Any:
        found = self._settings.get(key)
        return default if found is None else found

    def choose(self, key: str, choices: tuple[Any, ...], default: Any) -> Any:
        found = self.get(key, default)
        if found not in choices or type(found) is not type(choices[0]):
            self.reject(key, found, " or ".join(map(repr, choices)))
        return found

    def group_size(self, key: str = "group_size", default: int = 128) -> int:
        found = self.get(key, default)
        if type(found) is not int or (found < 1 and found != -1):
            self.reject(key, found, "a whole number of inputs, or -1 for all")
            return default
        return found

    def block(self, key: str) -> tuple[int, int] | None:
        found = self.get(key, None)
        if found is None:
            return None
        if not (isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found)):
            self.reject(key, found, "two whole numbers, rows and columns")
            return None
        return (found[0], found[1])

    def reject(self, key: str, found: object, expected: str) -> None:
        self.problems.append(f"{key} is {show(found)}; expected {expected}")


def _read_fp8(settings: _Settings) -> QuantFormat:
    settings.choose("fmt", ("e4m3", "e5m2"), "e4m3")
    return Scaled("fp8", "weight_scale_inv", settings.block("weight_block_size"))


def _read_compressed(settings: _Settings) -> QuantFormat:
    settings.choose("format", _PLAIN_SCALES, "missing")
    sparsity = settings.get("sparsity_config", {})
    if sparsity and sparsity.get("format", "dense") != "dense":
        settings.reject("sparsity_config", sparsity, "none, or a dense one")
    groups = settings.get("config_groups", {})
    blocks = set()
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        weights = _Settings(group.get("weights") or {} if isinstance(group, Mapping) else {})
        strategy = weights.choose("strategy", ("tensor", "channel", "group", "block"), "tensor")
        blocks.add(
            weights.block("block_structure") if strategy == "block"
            else (1, weights.group_size()) if strategy == "group"
            else None
        )  # fmt: skip
        settings.problems += [f"config_groups.{name}.weights.{problem}" for problem in weights.problems]
    if len(blocks) > 1:
        settings.reject("config_groups", groups, "blocks of one size")
    return Scaled("compressed-tensors", "weight_scale", next(iter(blocks), None))


def _read_mxfp4(settings: _Settings) -> QuantFormat:
    return Mxfp4()


def _read_gptq(settings: _Settings) -> QuantFormat:
    bits = settings.choose("bits", (4, 8), 4)
    version = settings.choose("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    return Gptq(bits, settings.group_size(), zeros_less_one=version == "gptq")


def _read_awq(settings: _Settings) -> QuantFormat:
    settings.choose("bits", (4,), settings.get("w_bit", 4))
    version = settings.get("version", "gemm")
    if str(version).lower() != "gemm":
        settings.reject("version", version, "'gemm'")
    if settings.get("zero_point", default=True) is not True:
        settings.reject("zero_point", settings.get("zero_point", None), "true")
    return Awq(settings.group_size(default=settings.group_size("q_group_size")))


def _read_bitsandbytes(settings: _Settings) -> QuantFormat:
    in_4bit = settings.get("load_in_4bit", False) or settings.get("_load_in_4bit", False)
    return Bnb4Bit() if in_4bit else Bnb8Bit()


_READERS: Mapping[str, Callable[[_Settings], QuantFormat]] = {
    "fp8": _read_fp8,
    "compressed-tensors": _read_compressed,
    "mxfp4": _read_mxfp4,
    "gptq": _read_gptq,
    "awq": _read_awq,
    "bitsandbytes": _read_bitsandbytes,
}


def read_quantisation(config: Mapping[str, Any], *, where: str) -> tuple[dict[str, Any], QuantFormat | None]:
    """The config of the plain checkpoint, and how the weights of this one are quantised.

    A config that says nothing of it, or names a way that is not known, is given back as it is, with None: reading the
    network refuses the latter.

    Args:
        config: contents of a `config.json`.
        where: what to call it in texts of errors.

    Raises:
        UnsupportedModelError: of a known way settings that are not implemented; all are listed.
    """
    inside = config.get(_INSIDE)
    given = {key: config[key] for key in QUANTISATION_KEYS if config.get(key) is not None}
    if not given and isinstance(inside, Mapping):
        text, scheme = read_quantisation({**inside, _INSIDE: None}, where=where)
        return {**config, _INSIDE: {key: text[key] for key in text if key != _INSIDE}} if scheme else dict(
            config
        ), scheme
    key, described = next(iter(given.items()), ("", None))
    method = _method_of(described) if isinstance(described, Mapping) and _OTHERS not in given else None
    if not isinstance(method, str) or method not in _READERS or not isinstance(described, Mapping):
        return dict(config), None
    settings = _Settings(described)
    scheme = _READERS[method](settings)
    if settings.problems:
        raise UnsupportedModelError(
            f"{where}: config.json describes weights that HookLens cannot dequantise: {key} of {method}: "
            f"{'; '.join(settings.problems)}. Take the checkpoint that was quantised"
        )
    plain = {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}
    return plain, scheme


def _method_of(described: Mapping[str, Any]) -> object:
    """The name of the way; old configs of bitsandbytes have none."""
    if "quant_method" not in described and (described.get("load_in_8bit") or described.get("load_in_4bit")):
        return "bitsandbytes"
    return described.get("quant_method")
