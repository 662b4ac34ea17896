"""A key-value cache on disk, as a safetensors file."""

import json
import os
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.errors import CacheError, join_names
from hooklens.files import read_safetensors, write_safetensors

_FORMAT = "hooklens-kv-cache-1"
_OPTIONAL = frozenset({"last_logits", "token_ids", "document_ids"})
_KEYS = frozenset({"format", "n_layers", "frozen", "fingerprint", "transforms", "restarts_positions"})


class StoredCache(NamedTuple):
    """What a file holds of a cache.

    Attributes:
        keys: one tensor per layer.
        values: one tensor per layer.
        attention_mask: of the cached columns.
        last_logits: logits at each row's last token, where the cache had them.
        token_ids: the token in each column, where the cache knew them.
        frozen: whether the cache was frozen.
        fingerprint: of the model's configuration, or None.
        transforms: the weight-processing steps of the model.
        document_ids: of the cached columns, or None.
        restarts_positions: positions are counted within each document.
    """

    keys: list[Float[Tensor, "batch pos kv_head d_head"]]
    values: list[Float[Tensor, "batch pos kv_head d_head"]]
    attention_mask: Bool[Tensor, "batch pos"]
    last_logits: Float[Tensor, "batch d_vocab"] | None
    token_ids: Int[Tensor, "batch pos"] | None
    frozen: bool
    fingerprint: str | None
    transforms: tuple[str, ...]
    document_ids: Int[Tensor, "batch pos"] | None = None
    restarts_positions: bool = True


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
    if stored.document_ids is not None:
        tensors["document_ids"] = stored.document_ids
    if stored.token_ids is not None:
        tensors["token_ids"] = stored.token_ids
    metadata = {
        "format": _FORMAT,
        "n_layers": str(len(stored.keys)),
        "frozen": str(int(stored.frozen)),
        "fingerprint": stored.fingerprint or "",
        "transforms": json.dumps(stored.transforms),
        "restarts_positions": str(int(stored.restarts_positions)),
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
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"cannot read a key-value cache from {path}: {error}") from error


def _interpret(tensors: dict[str, Tensor], metadata: dict[str, str]) -> StoredCache:
    """The contents of a file, checked; `ValueError` says what is wrong."""
    # The record of weight processing and the documents are the younger parts of the format.
    metadata = {"transforms": "[]", "restarts_positions": "1", **metadata}
    if metadata.keys() != _KEYS:
        raise ValueError(f"its metadata are {join_names(sorted(metadata))}; expected {join_names(sorted(_KEYS))}")
    if not metadata["n_layers"].isdecimal() or len(metadata["n_layers"]) > 6 or metadata["frozen"] not in ("0", "1"):
        raise ValueError(f"n_layers is {metadata['n_layers']!r} and frozen {metadata['frozen']!r}; expected numbers")
    transforms = json.loads(metadata["transforms"])
    if not isinstance(transforms, list) or not all(isinstance(step, str) for step in transforms):
        raise ValueError(f"transforms are {metadata['transforms']}; expected a list of names")
    if metadata["restarts_positions"] not in ("0", "1"):
        raise ValueError(f"restarts_positions is {metadata['restarts_positions']!r}; expected 0 or 1")
    layers = range(int(metadata["n_layers"]))
    wanted = {"attention_mask"} | {f"{layer}.{part}" for layer in layers for part in ("keys", "values")}
    wrong = sorted(wanted ^ (tensors.keys() - _OPTIONAL))
    if wrong or not layers:
        raise ValueError(f"the tensors {join_names(wrong)} are missing or too many for {len(layers)} layers")
    mask = tensors["attention_mask"]
    if mask.ndim != 2 or mask.dtype != torch.uint8 or bool((mask > 1).any()):
        raise ValueError(f"attention_mask is {mask.dtype} {list(mask.shape)}; expected torch.uint8 [batch pos], 0 or 1")
    ids = tensors.get("token_ids")
    if ids is not None and (ids.dtype != torch.long or ids.shape != mask.shape or bool((ids < 0).any())):
        raise ValueError(f"token_ids are {ids.dtype} {list(ids.shape)}; expected torch.int64 {list(mask.shape)} from 0")
    return StoredCache(
        keys=[tensors[f"{layer}.keys"] for layer in layers],
        values=[tensors[f"{layer}.values"] for layer in layers],
        attention_mask=mask.bool(),
        last_logits=tensors.get("last_logits"),
        token_ids=ids,
        frozen=metadata["frozen"] == "1",
        fingerprint=metadata["fingerprint"] or None,
        transforms=tuple(transforms),
        document_ids=tensors.get("document_ids"),
        restarts_positions=metadata["restarts_positions"] == "1",
    )
