"""The file of a sweep's result: safetensors, with what the values are labelled by as JSON in its metadata.

It is written whole or not at all (`hooklens.files`), and read with every key checked, so that a damaged file is an
error that names the key.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hooklens.arguments import show
from hooklens.errors import CheckpointError
from hooklens.files import read_safetensors, write_safetensors

_FORMAT = "hooklens.patching.result-1"
_TENSORS = ("per_pair", "clean", "corrupted")


def write_result(path: str | Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    """Write a result's tensors and what describes them.

    Raises:
        CheckpointError: the file cannot be written, or a label is no text or number.
    """
    try:
        metadata = {"format": _FORMAT, "description": json.dumps(described)}
        write_safetensors(path, tensors, metadata)
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot write a sweep to {path}: {error}") from error


def read_result(path: str | Path, stats_fields: Mapping[str, type]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_result` wrote, checked key by key.

    Args:
        path: the file.
        stats_fields: by name, whether an entry of the statistics is a whole number or any.

    Raises:
        CheckpointError: the file is missing, damaged, or no sweep result; it names the key that is not as it should be.
    """
    try:
        tensors, metadata = read_safetensors(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read a sweep from {path}: {error}") from error
    if metadata.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a saved sweep; write one with result.save(path)")
    try:
        described = json.loads(metadata.get("description", ""))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: key 'description' is damaged: {error}") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"{path}: key 'description' is {show(described)}; expected a mapping")
    for key, (expected, holds) in _checks(stats_fields).items():
        if key not in described or not holds(described[key]):
            found = f"is {show(described[key])}" if key in described else "is missing"
            raise CheckpointError(f"{path}: key {key!r} {found}; expected {expected}")
    _check_tensors(path, tensors, described)
    return tensors, described


def _checks(stats_fields: Mapping[str, type]) -> dict[str, tuple[str, Callable[[Any], bool]]]:
    """By key, what is expected, and whether a value is that."""
    return {
        "axes": ("a list of [name, labels]", _are_axes),
        "cells": ("a list of mappings", lambda found: _is_list(found, lambda cell: isinstance(cell, dict))),
        "metric": ("a text", lambda found: isinstance(found, str)),
        "direction": ("'denoise' or 'noise'", lambda found: isinstance(found, str) and found in ("denoise", "noise")),
        "stats": (
            f"the numbers {', '.join(stats_fields)}",
            lambda found: (
                isinstance(found, dict)
                and found.keys() == stats_fields.keys()
                and all(_is_number(found[name], kind) for name, kind in stats_fields.items())
            ),
        ),
    }


def _are_axes(found: Any) -> bool:
    def is_axis(one: Any) -> bool:
        return (
            isinstance(one, list)
            and len(one) == 2
            and isinstance(one[0], str)
            and _is_list(one[1], lambda label: isinstance(label, str) or _is_number(label, int))
        )

    return _is_list(found, is_axis) and len({one[0] for one in found}) == len(found)


def _is_list(found: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(found, list) and all(holds(one) for one in found)


def _is_number(found: Any, kind: type) -> bool:
    allowed = int if kind is int else (int, float)
    return isinstance(found, allowed) and not isinstance(found, bool)


def _check_tensors(path: str | Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
    if set(tensors) != set(_TENSORS):
        raise CheckpointError(f"{path}: holds the tensors {sorted(tensors)}; expected {sorted(_TENSORS)}")
    sizes = [len(labels) for _, labels in described["axes"]]
    n_pairs = tensors["clean"].numel()
    for name, shape in (("per_pair", [*sizes, n_pairs]), ("clean", [n_pairs]), ("corrupted", [n_pairs])):
        found = tensors[name]
        if list(found.shape) != shape or not found.is_floating_point():
            raise CheckpointError(f"{path}: key {name!r} is {show(found)}; expected floating numbers {shape}")
    if len(described["cells"]) != math.prod(sizes):
        raise CheckpointError(
            f"{path}: key 'cells' has {len(described['cells'])} entries; the axes have {math.prod(sizes)}"
        )
