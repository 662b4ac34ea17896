"""A key-value cache on disk, as a safetensors file."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooklens.errors import CacheError

_FORMAT = "hooklens-kv-cache-1"


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


def write_cache(path: str | Path, stored: StoredCache) -> None:
    """Write a cache to a safetensors file.

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
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"cannot write the key-value cache to {path}: {error}") from error


def read_cache(path: str | Path, *, device: torch.device | str = "cpu") -> StoredCache:
    """Read what `write_cache` wrote.

    Raises:
        CacheError: the file is missing, damaged, or not a key-value cache.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CacheError(f"{path} is not a saved key-value cache; write one with cache.save(path)")
            layers = range(int(metadata["n_layers"]))
            has_logits = "last_logits" in file.keys()  # noqa: SIM118  (safe_open is no mapping)
            return StoredCache(
                keys=[file.get_tensor(f"{layer}.keys") for layer in layers],
                values=[file.get_tensor(f"{layer}.values") for layer in layers],
                attention_mask=file.get_tensor("attention_mask").bool(),
                last_logits=file.get_tensor("last_logits") if has_logits else None,
                frozen=metadata["frozen"] == "1",
                fingerprint=metadata["fingerprint"] or None,
                # The record is the younger part of the format.
                transforms=tuple(json.loads(metadata.get("transforms", "[]"))),
            )
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise CacheError(f"cannot read a key-value cache from {path}: {error}") from error
