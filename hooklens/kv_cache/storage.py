"""A key-value cache on disk, as a safetensors file."""

import json
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooklens.errors import CacheError, join_names
from hooklens.files import read_safetensors, write_safetensors
from hooklens.kv_cache.arguments import read_device, require
from hooklens.kv_cache.entry import HookedKeyValueCacheEntry

if TYPE_CHECKING:
    from hooklens.kv_cache.cache import HookedKeyValueCache

_FORMAT = "hooklens-kv-cache-1"
_OPTIONAL = ("last_logits", "token_ids", "document_ids")
_KEYS = frozenset({"format", "n_layers", "frozen", "fingerprint", "transforms", "restarts_positions", "adapters"})


def write_cache(path: str | os.PathLike[str], cache: "HookedKeyValueCache") -> None:
    """Write a cache to a safetensors file; a file that is there is replaced in one step.

    Raises:
        CacheError: the file cannot be written.
    """
    _check_path(path)
    if any(entry.past_keys.shape[2] != entry.head_shape[0] for entry in cache.entries):
        raise CacheError(
            "this cache holds the keys and values of some heads or layers, others lie in other processes; put it "
            "together first, hooklens.parallel.gather_cache(model, cache)"
        )
    tensors = {"attention_mask": cache.previous_attention_mask.to(torch.uint8)}
    for layer, entry in enumerate(cache.entries):
        tensors[f"{layer}.keys"], tensors[f"{layer}.values"] = entry.past_keys, entry.past_values
    optional = {name: getattr(cache, name) for name in _OPTIONAL}
    tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    metadata = {
        "format": _FORMAT,
        "n_layers": str(len(cache.entries)),
        "frozen": str(int(cache.frozen)),
        "fingerprint": cache.fingerprint or "",
        "transforms": json.dumps(cache.transforms),
        "restarts_positions": str(int(cache.restarts_positions)),
        "adapters": json.dumps(cache.adapters),
    }
    try:
        write_safetensors(path, tensors, metadata)
    except (OSError, ValueError) as error:
        raise CacheError(f"cannot write the key-value cache to {path}: {error}") from error


def read_cache(
    path: str | os.PathLike[str], make: Callable[..., "HookedKeyValueCache"], *, device: torch.device | str = "cpu"
) -> "HookedKeyValueCache":
    """Read what `write_cache` wrote.

    Args:
        path: the file.
        make: makes a cache of entries, a mask, and the rest by keyword.
        device: where the tensors are to lie.

    Raises:
        CacheError: the file is missing, damaged, or not a key-value cache.
    """
    _check_path(path)
    place = read_device(device) or torch.device("cpu")
    if place.type == "meta":
        raise CacheError(f"device={device!r} holds no data; expected one that a file can be read to")
    try:
        tensors, metadata = read_safetensors(path, device=place)
        if metadata.get("format") == _FORMAT:
            n_layers, rest = _interpret(tensors, metadata)
            pairs = [(tensors[f"{layer}.keys"], tensors[f"{layer}.values"]) for layer in range(n_layers)]
            cache = make([HookedKeyValueCacheEntry(*pair) for pair in pairs], tensors["attention_mask"].bool(), **rest)
            cache.last_logits = tensors.get("last_logits")
            return cache
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"cannot read a key-value cache from {path}: {error}") from error
    raise CacheError(f"{path} is not a saved key-value cache; write one with cache.save(path)")


def _check_path(path: object) -> None:
    require(path, (str, os.PathLike), what="path", expected="a path")


def _interpret(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[int, dict[str, Any]]:
    """The number of layers and keywords of a cache, all contents checked; `ValueError` says what is wrong."""
    # The records of weight processing and adapters and the documents are the younger parts of the format.
    metadata = {"transforms": "[]", "adapters": "[]", "restarts_positions": "1", **metadata}
    if metadata.keys() != _KEYS:
        raise ValueError(f"its metadata are {join_names(sorted(metadata))}; expected {join_names(sorted(_KEYS))}")
    if not metadata["n_layers"].isdecimal() or len(metadata["n_layers"]) > 6 or metadata["frozen"] not in ("0", "1"):
        raise ValueError(f"n_layers is {metadata['n_layers']!r} and frozen {metadata['frozen']!r}; expected numbers")
    records = {name: _read_record(metadata, name) for name in ("transforms", "adapters")}
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
    return len(layers), {
        "frozen": metadata["frozen"] == "1",
        "fingerprint": metadata["fingerprint"] or None,
        **records,
        "restarts_positions": metadata["restarts_positions"] == "1",
        "document_ids": tensors.get("document_ids"),
        "token_ids": ids,
    }


def _read_record(metadata: dict[str, str], name: str) -> tuple[str, ...]:
    record = json.loads(metadata[name])
    if not isinstance(record, list) or not all(isinstance(one, str) for one in record):
        raise ValueError(f"{name} are {metadata[name]}; expected a list of names")
    return tuple(record)
