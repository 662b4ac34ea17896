"""Captured activations as one safetensors file: each distinct tensor once, everything else in the header."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooklens.activation_cache.memory import identify, own_memory
from hooklens.config import HookedConfig
from hooklens.errors import CacheError

_FORMAT = "hooklens.activation_cache"
_FORMAT_VERSION = "1"


@dataclass(frozen=True, kw_only=True)
class StoredCache:
    """All of an activation cache that a file holds; the fields are those of the cache.

    The weights are not among them, nor is the autograd graph.
    """

    tensors: Mapping[str, Tensor]
    cfg: HookedConfig
    transforms: tuple[str, ...]
    tokens: Tensor | None
    attention_mask: Tensor | None
    positions: tuple[int, ...] | None
    has_batch_dim: bool


def write_cache(path: str | os.PathLike[str], cache: StoredCache) -> None:
    """Write a cache; a file that is already there is replaced in one step.

    Raises:
        CacheError: the file cannot be written.
    """
    stored: dict[str, Tensor] = {}
    place_of: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for name, tensor in cache.tensors.items():
        place = first_name.setdefault(identify(tensor), f"activation.{name}")
        place_of[name] = place
        if place not in stored:
            stored[place] = tensor
    for name, extra in (("tokens", cache.tokens), ("attention_mask", cache.attention_mask)):
        if extra is not None:
            stored[name] = extra
    header = {
        "cfg": cache.cfg.to_dict(),
        "transforms": cache.transforms,
        "positions": cache.positions,
        "has_batch_dim": cache.has_batch_dim,
        "place_of": place_of,
    }
    metadata = {"format": "pt", _FORMAT: _FORMAT_VERSION, "header": json.dumps(header)}
    # A cache loaded from this path may still read from the file: write beside it and put it in its place.
    target = Path(path)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    try:
        save_file(own_memory(stored), partial, metadata=metadata)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"cannot write the activation cache to {str(target)!r}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_cache(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> StoredCache:
    """Read what `write_cache` wrote; aliases are one tensor again.

    Raises:
        CacheError: the file is missing, damaged, or not an activation cache of this format version.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get(_FORMAT) != _FORMAT_VERSION:
                raise CacheError(
                    f"{str(path)!r} is a safetensors file, but no activation cache of format version "
                    f"{_FORMAT_VERSION} (found {metadata.get(_FORMAT)!r}); expected what ActivationCache.save wrote"
                )
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        header = json.loads(metadata["header"])
        # The positions are the younger part of the format.
        positions = header.get("positions")
        return StoredCache(
            tensors={name: stored[place] for name, place in header["place_of"].items()},
            cfg=HookedConfig.from_dict(header["cfg"]),
            transforms=tuple(header["transforms"]),
            tokens=stored.get("tokens"),
            attention_mask=stored.get("attention_mask"),
            positions=None if positions is None else tuple(positions),
            has_batch_dim=header["has_batch_dim"],
        )
    except CacheError:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CacheError(
            f"{str(path)!r} cannot be read as an activation cache ({type(error).__name__}: {error}); "
            "expected a file that ActivationCache.save wrote"
        ) from error
