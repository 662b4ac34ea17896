"""Captured activations as one safetensors file: each distinct tensor once, everything else in the header."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.activation_cache.memory import identify
from hooklens.activation_cache.missing import GRAD
from hooklens.axes import find_site
from hooklens.config import HookedConfig
from hooklens.errors import CacheError, join_names
from hooklens.files import read_safetensors, write_safetensors

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
    _check_path(path)
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
    try:
        write_safetensors(path, stored, metadata)
    except (OSError, ValueError) as error:
        raise CacheError(f"cannot write the activation cache to {str(path)!r}: {error}") from error


def read_cache(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> StoredCache:
    """Read what `write_cache` wrote; aliases are one tensor again.

    Raises:
        CacheError: the file is missing, damaged, or not an activation cache of this format version.
    """
    _check_path(path)
    try:
        stored, metadata = read_safetensors(path, device=device)
        if metadata.get(_FORMAT) != _FORMAT_VERSION:
            raise CacheError(
                f"{str(path)!r} is a safetensors file, but no activation cache of format version "
                f"{_FORMAT_VERSION} (found {metadata.get(_FORMAT)!r}); expected what ActivationCache.save wrote"
            )
        unknown = sorted(metadata.keys() - {"format", _FORMAT, "header"})
        if unknown:
            raise ValueError(f"unknown metadata {join_names(unknown)}")
        return _interpret(stored, json.loads(metadata["header"]))
    except CacheError:
        raise
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CacheError(
            f"{str(path)!r} cannot be read as an activation cache ({type(error).__name__}: {error}); "
            "expected a file that ActivationCache.save wrote"
        ) from error


def _check_path(path: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise CacheError(f"path={path!r} ({type(path).__name__}); expected a path to a file")


def _interpret(stored: dict[str, Tensor], header: object) -> StoredCache:
    """The contents of a file, checked; `KeyError`, `TypeError` and `ValueError` say what is wrong."""
    if not isinstance(header, dict):
        raise ValueError(f"the header is a {type(header).__name__}, not an object")
    # The positions are the younger part of the format.
    header = {"positions": None, **header}
    place_of, positions = header["place_of"], header["positions"]
    if not isinstance(place_of, dict) or not isinstance(header["cfg"], dict):
        raise ValueError("place_of and cfg are not both objects")
    if not isinstance(header["has_batch_dim"], bool):
        raise ValueError(f"has_batch_dim is {header['has_batch_dim']!r}")
    if not _is_list_of(str, header["transforms"]) or not (positions is None or _is_list_of(int, positions)):
        raise ValueError(f"transforms are {header['transforms']!r} and positions {positions!r}; expected lists")
    unplaced = sorted(stored.keys() - {*place_of.values(), "tokens", "attention_mask"})
    if unplaced:
        raise ValueError(f"no activation is read from the tensors {join_names(unplaced)}")
    found = StoredCache(
        tensors={name: stored[place] for name, place in place_of.items()},
        cfg=HookedConfig.from_dict(header["cfg"]),
        transforms=tuple(header["transforms"]),
        tokens=stored.get("tokens"),
        attention_mask=stored.get("attention_mask"),
        positions=None if positions is None else tuple(positions),
        has_batch_dim=header["has_batch_dim"],
    )
    _check_shapes(found)
    return found


def _check_shapes(found: StoredCache) -> None:
    """Check what the names of tensors promise; `ValueError` lists what is wrong."""
    wrong = []
    for name, tensor in found.tensors.items():
        site = find_site(name.removesuffix(GRAD))
        if site is not None:
            axes = [axis for axis in site.axes if found.has_batch_dim or axis != "batch"]
            if tensor.ndim != len(axes) or not tensor.is_floating_point():
                wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected floats [{' '.join(axes)}]")
    tokens, mask = found.tokens, found.attention_mask
    if tokens is not None and (tokens.ndim != 2 or tokens.is_floating_point()):
        wrong.append(f"tokens are {tokens.dtype} {list(tokens.shape)}, expected ints [batch pos]")
    if mask is not None and mask.ndim != 2:
        wrong.append(f"attention_mask is {list(mask.shape)}, expected [batch key]")
    if not wrong and tokens is not None and mask is not None and not _covers(mask, tokens):
        wrong.append(f"tokens are {list(tokens.shape)} and attention_mask {list(mask.shape)}, expected the same rows")
    if wrong:
        raise ValueError("; ".join(wrong))


def _covers(mask: Tensor, tokens: Tensor) -> bool:
    """Whether a mask is over the tokens, or over past + new ones."""
    return len(mask) == len(tokens) and mask.shape[1] >= tokens.shape[1]


def _is_list_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
