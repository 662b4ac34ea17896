"""A key-value cache on disk, as a safetensors file."""

import json
import os
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.errors import CacheError, join_names
from hooklens.files import read_safetensors, write_safetensors

_FORMAT = "hooklens-kv-cache-1"
_KEYS = frozenset({"format", "n_layers", "frozen", "fingerprint", "transforms"})


class StoredCache(NamedTuple):
    """What a file holds of a cache.

    Attributes:
        keys: one tensor per layer.
        values: one tensor per layer.
        attention_mask: of the cached columns.
        last_logits: logits at each row's last token, where the cache had them.
        frozen: whether the cache was frozen.
        fingerprint: of the model's configuration, or None.
        transforms: the weight-processing steps of the model.
    """

    keys: list[Float[Tensor, "batch pos kv_head d_head"]]
    values: list[Float[Tensor, "batch pos kv_head d_head"]]
    attention_mask: Bool[Tensor, "batch pos"]
    last_logits: Float[Tensor, "batch d_vocab"] | None
    frozen: bool
    fingerprint: str | None
    transforms: tuple[str, ...]


def write_cache(path: str | os.PathLike[str], stored: StoredCache) -> None:
    """Write a cache to a safetensors file; a file that is there is replaced in one step.

    Raises:
        CacheError: the file cannot be written.
    """
    tensors = {"attention_mask": stored.attention_mask.to(torch.uint8)}
    for layer, (keys, values) in enumerate(zip(stored.keys, stored.values, strict=True)):
        tensors[f"{layer}.keys"], tensors[f"{layer}.values"] = keys, values
    if stored.last_logits is not None:
        tensors["last_logits"] = stored.last_logits
    metadata = {
        "format": _FORMAT,
        "n_layers": str(len(stored.keys)),
        "frozen": str(int(stored.frozen)),
        "fingerprint": stored.fingerprint or "",
        "transforms": json.dumps(stored.transforms),
    }
    try:
        write_safetensors(path, tensors, metadata)
    except (OSError, ValueError) as error:
        raise CacheError(f"cannot write the key-value cache to {path}: {error}") from error


def read_cache(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> StoredCache:
    """Read what `write_cache` wrote.

    Raises:
        CacheError: the file is missing, damaged, or not a key-value cache.
    """
    try:
        tensors, metadata = read_safetensors(path, device=device)
        if metadata.get("format") != _FORMAT:
            raise CacheError(f"{path} is not a saved key-value cache; write one with cache.save(path)")
        return _interpret(tensors, metadata)
    except CacheError:
        raise
    except (OSError, ValueError) as error:
        raise CacheError(f"cannot read a key-value cache from {path}: {error}") from error


def _interpret(tensors: dict[str, Tensor], metadata: dict[str, str]) -> StoredCache:
    """The contents of a file, checked; `ValueError` says what is wrong."""
    # The record of weight processing is the younger part of the format.
    metadata = {"transforms": "[]", **metadata}
    if metadata.keys() != _KEYS:
        raise ValueError(f"its metadata are {join_names(sorted(metadata))}; expected {join_names(sorted(_KEYS))}")
    if not metadata["n_layers"].isdecimal() or len(metadata["n_layers"]) > 6 or metadata["frozen"] not in ("0", "1"):
        raise ValueError(f"n_layers is {metadata['n_layers']!r} and frozen {metadata['frozen']!r}; expected numbers")
    transforms = json.loads(metadata["transforms"])
    if not isinstance(transforms, list) or not all(isinstance(step, str) for step in transforms):
        raise ValueError(f"transforms are {metadata['transforms']}; expected a list of names")
    layers = range(int(metadata["n_layers"]))
    wanted = {"attention_mask"} | {f"{layer}.{part}" for layer in layers for part in ("keys", "values")}
    wrong = sorted(wanted ^ (tensors.keys() - {"last_logits"}))
    if wrong or not layers:
        raise ValueError(f"the tensors {join_names(wrong)} are missing or too many for {len(layers)} layers")
    mask = tensors["attention_mask"]
    if mask.ndim != 2 or mask.dtype != torch.uint8 or bool((mask > 1).any()):
        raise ValueError(f"attention_mask is {mask.dtype} {list(mask.shape)}; expected torch.uint8 [batch pos], 0 or 1")
    return StoredCache(
        keys=[tensors[f"{layer}.keys"] for layer in layers],
        values=[tensors[f"{layer}.values"] for layer in layers],
        attention_mask=mask.bool(),
        last_logits=tensors.get("last_logits"),
        frozen=metadata["frozen"] == "1",
        fingerprint=metadata["fingerprint"] or None,
        transforms=tuple(transforms),
    )
