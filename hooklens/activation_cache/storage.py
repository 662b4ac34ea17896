"""Captured activations as one safetensors file: each distinct tensor once, everything else in the header."""

import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from hooklens.activation_cache.memory import identify
from hooklens.axes import find_site
from hooklens.config import HookedConfig
from hooklens.errors import CacheError, join_names
from hooklens.files import read_safetensors, write_safetensors
from hooklens.hooks.capture import GRAD

_FORMAT = "hooklens.activation_cache"
_FORMAT_VERSION = "1"
_TENSORS = ("tokens", "attention_mask")

Made = TypeVar("Made")


def write_cache(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write a cache; a file that is already there is replaced in one step.

    Args:
        path: the file.
        tensors: the activations, without their autograd graph.
        record: all else that a cache is made of but the weights, by keyword of its constructor.

    Raises:
        CacheError: the file cannot be written.
    """
    _check_path(path)
    stored: dict[str, Tensor] = {}
    place_of: dict[str, str] = {}
    first_name: dict[tuple[object, ...], str] = {}
    for name, tensor in tensors.items():
        place_of[name] = first_name.setdefault(identify(tensor), f"activation.{name}")
        stored.setdefault(place_of[name], tensor)
    stored |= {name: record[name] for name in _TENSORS if record[name] is not None}
    header = {name: value for name, value in record.items() if name not in _TENSORS}
    header |= {"cfg": record["cfg"].to_dict(), "place_of": place_of}
    metadata = {"format": "pt", _FORMAT: _FORMAT_VERSION, "header": json.dumps(header)}
    try:
        write_safetensors(path, stored, metadata)
    except (OSError, ValueError) as error:
        raise CacheError(f"cannot write the activation cache to {str(path)!r}: {error}") from error


def read_cache(path: str | os.PathLike[str], make: Callable[..., Made], *, device: torch.device | str = "cpu") -> Made:
    """Read what `write_cache` wrote; aliases are one tensor again.

    Args:
        path: the file.
        make: makes a cache of the tensors, and of the record as keywords.
        device: where the tensors are to lie.

    Raises:
        CacheError: the file is missing, damaged, or not an activation cache of this format version.
    """
    _check_path(path)
    try:
        stored, metadata = read_safetensors(path, device=device)
        if (version := metadata.get(_FORMAT)) == _FORMAT_VERSION:
            if unknown := sorted(metadata.keys() - {"format", _FORMAT, "header"}):
                raise ValueError(f"unknown metadata {join_names(unknown)}")
            tensors, record = _interpret(stored, json.loads(metadata["header"]))
            return make(tensors, **record)
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CacheError(
            f"{str(path)!r} cannot be read as an activation cache ({type(error).__name__}: {error}); "
            "expected a file that ActivationCache.save wrote"
        ) from error
    raise CacheError(
        f"{str(path)!r} is a safetensors file, but no activation cache of format version "
        f"{_FORMAT_VERSION} (found {version!r}); expected what ActivationCache.save wrote"
    )


def _check_path(path: object) -> None:
    if not isinstance(path, str | os.PathLike):
        raise CacheError(f"path={path!r} ({type(path).__name__}); expected a path to a file")


def _interpret(stored: dict[str, Tensor], header: object) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the record in a file, checked; `KeyError`, `TypeError` and `ValueError` say what is wrong."""
    if not isinstance(header, dict):
        raise ValueError(f"the header is a {type(header).__name__}, not an object")
    place_of, has_batch_dim = header["place_of"], header["has_batch_dim"]
    # The younger part of the format.
    positions = header.get("positions")
    if not isinstance(place_of, dict) or not isinstance(header["cfg"], dict):
        raise ValueError("place_of and cfg are not both objects")
    if not isinstance(has_batch_dim, bool):
        raise ValueError(f"has_batch_dim is {has_batch_dim!r}")
    if not _is_list_of(str, header["transforms"]) or not (positions is None or _is_list_of(int, positions)):
        raise ValueError(f"transforms are {header['transforms']!r} and positions {positions!r}; expected lists")
    if unplaced := sorted(stored.keys() - {*place_of.values(), *_TENSORS}):
        raise ValueError(f"no activation is read from the tensors {join_names(unplaced)}")
    tensors = {name: stored[place] for name, place in place_of.items()}
    _check_shapes(tensors, stored.get("tokens"), has_batch_dim=has_batch_dim)
    return tensors, {
        "cfg": HookedConfig.from_dict(header["cfg"]),
        "transforms": tuple(header["transforms"]),
        "positions": None if positions is None else tuple(positions),
        "has_batch_dim": has_batch_dim,
        **{name: stored.get(name) for name in _TENSORS},
    }


def _check_shapes(tensors: Mapping[str, Tensor], tokens: Tensor | None, *, has_batch_dim: bool) -> None:
    """Check what the names of tensors promise; `ValueError` lists what is wrong."""
    wrong = []
    for name, tensor in tensors.items():
        site = find_site(name.removesuffix(GRAD))
        if site is not None:
            axes = [axis for axis in site.axes if has_batch_dim or axis != "batch"]
            if tensor.ndim != len(axes) or tensor.is_floating_point() == site.discrete:
                kind = "ints" if site.discrete else "floats"
                wrong.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {kind} [{' '.join(axes)}]")
    if tokens is not None and tokens.is_floating_point():
        wrong.append(f"tokens are {tokens.dtype} {list(tokens.shape)}, expected ints [batch pos]")
    if wrong:
        raise ValueError("; ".join(wrong))


def _is_list_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)
