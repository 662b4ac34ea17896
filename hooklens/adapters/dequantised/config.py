"""How a checkpoint is quantised, as its `config.json` says."""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.dequantised.readers import METHODS, read_scheme
from hooklens.adapters.dequantised.tensors import QuantFormat
from hooklens.adapters.keys.config_map import QUANTISATION_KEYS

_INSIDE = "text_config"
# MLX's own.
_OTHERS = "quantization"


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
        if scheme is None:
            return dict(config), None
        return {**config, _INSIDE: {key: value for key, value in text.items() if key != _INSIDE}}, scheme
    key, described = next(iter(given.items()), ("", None))
    method = _method_of(described) if isinstance(described, Mapping) and _OTHERS not in given else None
    if not isinstance(method, str) or method not in METHODS or not isinstance(described, Mapping):
        return dict(config), None
    scheme = read_scheme(method, described, where=f"{where}: config.json: {key}")
    return {key: value for key, value in config.items() if key not in QUANTISATION_KEYS}, scheme


def _method_of(described: Mapping[str, Any]) -> object:
    """The name of the way; old configs of bitsandbytes have none."""
    if "quant_method" not in described and (described.get("load_in_8bit") or described.get("load_in_4bit")):
        return "bitsandbytes"
    return described.get("quant_method")
