"""Dataclasses whose fields may be tensors and functions, compared, hashed and printed as values."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor


class TensorValue:
    """Base of frozen dataclasses that are equal when they are of one class and their fields are equal.

    Tensors are equal when dtype, shape, device and all entries are; two tensors without entries (on the meta device)
    when they are one. Functions are equal as Python compares them, which is by identity. A hash looks at no entry of
    a tensor, so it costs little and stays when a tensor is changed in place.

    The printed form reads like the call that makes the value: fields left at their default are left out, tensors are
    `Tensor[4, 8]` (with dtype and device where these are not float32 and the CPU), functions stand by their name.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # `@dataclass` writes methods of its own, which compare tensors by `==`, unless the class itself has them.
        for method in ("__eq__", "__hash__", "__repr__"):
            if method not in cls.__dict__:
                setattr(cls, method, getattr(cls, method))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, TensorValue) or type(self) is not type(other):
            return NotImplemented
        return all(
            is_same_value(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)
        )

    def __hash__(self) -> int:
        return hash((type(self), *(_hashable(getattr(self, field.name)) for field in dataclasses.fields(self))))

    def __repr__(self) -> str:
        positional, named = [], []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING and not field.kw_only:
                positional.append(_print(value))
            elif field.default is dataclasses.MISSING or not is_same_value(value, field.default):
                named.append(f"{field.name}={_print(value)}")
        return f"{type(self).__name__}({', '.join(positional + named)})"


def is_same_value(one: Any, other: Any) -> bool:
    """Whether two fields are equal; lists, tuples, ranges and arrays are when their items are."""
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and _is_same_tensor(one, other)
    if _is_listing(one) and _is_listing(other):
        return len(one) == len(other) and all(map(is_same_value, one, other))
    return bool(one == other)


def _is_same_tensor(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    return not one.is_meta and torch.equal(one, other)


def _is_listing(value: Any) -> bool:
    return isinstance(value, np.ndarray | Sequence) and not isinstance(value, str)


def _hashable(value: Any) -> Any:
    """What a field adds to the hash; equal fields add the same."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    if _is_listing(value):
        return tuple(map(_hashable, value))
    # A callable object need not be hashable.
    return type(value) if callable(value) else value


def _print(value: Any) -> str:
    if isinstance(value, Tensor):
        parts = [str(size) for size in value.shape]
        parts += [str(value.dtype).removeprefix("torch.")] if value.dtype != torch.float32 else []
        parts += [str(value.device)] if value.device.type != "cpu" else []
        return f"Tensor[{', '.join(parts)}]"
    if isinstance(value, tuple):
        return f"({', '.join(map(_print, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, np.ndarray):
        return repr(value.tolist())
    if isinstance(value, list):
        return f"[{', '.join(map(_print, value))}]"
    if callable(value):
        return str(getattr(value, "__name__", None) or type(value).__name__)
    return repr(value)
