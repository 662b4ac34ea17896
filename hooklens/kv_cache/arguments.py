"""What callers hand to a cache, brought to plain values or refused with `CacheError`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooklens import arguments
from hooklens.errors import CacheError
from hooklens.hooks.choice import read_choice, resolve_choice

Rows = int | slice | Sequence[int] | np.integer[Any] | np.ndarray[Any, np.dtype[Any]] | Tensor | None
"""Rows of a cache as a caller names them."""


def require(given: object, kind: type | tuple[type, ...], *, what: str, expected: str) -> None:
    """Refuse another kind of argument.

    Raises:
        CacheError: `given` is not of the kind.
    """
    arguments.require(given, kind=kind, what=what, expected=expected, error=CacheError)


def read_count(given: object, *, what: str, least: int, most: int | None = None) -> int:
    """A whole number within bounds.

    Raises:
        CacheError: another kind of value, or out of bounds.
    """
    limit = arguments.MOST_ENTRIES if most is None else most
    return arguments.read_int(given, what=what, least=least, most=limit, error=CacheError)


def read_rows(rows: Rows, n_rows: int) -> slice | list[int]:
    """Rows of a cache, counted from 0; a slice stays one, so that tensors can be shared.

    A row may be named several times: a cache of several copies of a row is what several continuations of it need.

    Raises:
        CacheError: no rows, a mask, or rows out of range.
    """
    index = read_choice(rows, what="rows", allow_doubles=True, error=CacheError)
    numbers = resolve_choice(index, n_rows, what="rows", noun="rows in the cache", allow_doubles=True, error=CacheError)
    if not numbers:
        raise CacheError(f"rows={rows} names none of the {n_rows} rows in the cache; expected at least one")
    return index if isinstance(index, slice) and (index.step is None or index.step > 0) else numbers


def read_device(device: object, *, what: str = "device") -> torch.device | None:
    """A device that tensors can lie on; None stays None.

    Raises:
        CacheError: no such device, or not on this machine.
    """
    return None if device is None else arguments.read_device(device, what=what, error=CacheError)


def read_layer_devices(device: object, n_layers: int) -> tuple[torch.device | None, ...]:
    """The device of each layer: one given for all, or one for each; None where tensors stay.

    Raises:
        CacheError: no such devices, or not as many as layers.
    """
    if not isinstance(device, list | tuple):
        return (read_device(device),) * n_layers
    if len(device) != n_layers:
        raise CacheError(
            f"device names {len(device)} devices, the cache has {n_layers} layers; expected one device, or one for "
            "each layer (model.layer_devices)"
        )
    return tuple(read_device(one, what=f"device[{layer}]") for layer, one in enumerate(device))


def read_dtype(dtype: object, *, what: str = "dtype") -> torch.dtype | None:
    """A floating dtype; None stays None.

    Raises:
        CacheError: another kind of value, or a dtype that keys and values cannot have.
    """
    return None if dtype is None else arguments.read_dtype(dtype, what=what, error=CacheError)


def read_transforms(given: object) -> tuple[str, ...]:
    """The names of weight-processing steps.

    Raises:
        CacheError: something else than a tuple or list of strings.
    """
    if not isinstance(given, tuple | list) or not all(isinstance(step, str) for step in given):
        raise arguments.refusal(given, "transforms", "a tuple of step names, model.transforms", CacheError)
    return tuple(given)


def read_adapters(given: object) -> tuple[str, ...]:
    """The names of adapters.

    Raises:
        CacheError: something else than a tuple or list of strings.
    """
    if not isinstance(given, tuple | list) or not all(isinstance(name, str) for name in given):
        raise arguments.refusal(given, "adapters", "a tuple of names, model.active_adapters", CacheError)
    return tuple(given)


def read_mask(given: object, *, what: str) -> Tensor:
    """A mask as booleans `[rows columns]`; one of numbers is looked at, because it may hold others than 0 and 1.

    Raises:
        CacheError: no tensor of two axes, or values other than 0 and 1.
    """
    if not isinstance(given, Tensor) or given.ndim != 2:
        found = f"has shape {list(given.shape)}" if isinstance(given, Tensor) else f"is a {type(given).__name__}"
        raise CacheError(f"{what} {found}; expected a tensor of booleans [batch pos]")
    if given.dtype == torch.bool:
        return given
    if not given.is_meta and not bool(((given == 0) | (given == 1)).all()):
        raise CacheError(f"{what} ({given.dtype}) holds values other than 0 (padding) and 1 (token)")
    return given.bool()
