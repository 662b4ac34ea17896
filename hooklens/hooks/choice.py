"""Which entries of an axis: positions, heads, rows, neurons. Read here and nowhere else.

An entry is named by an int, a slice, or a list, array or tensor of ints; None is all of them. Negative numbers count
from the end. Masks are refused everywhere (a list `[True, False]` would otherwise be entries 1 and 0), and so are
entries that are named twice, of which one would silently win.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooklens.errors import HookLensError, InputError

Choice = int | slice | Sequence[int] | np.integer[Any] | np.ndarray[Any, np.dtype[Any]] | Tensor | None
"""Entries of an axis as a caller names them."""

Index = int | slice | tuple[int, ...] | None
"""The same in plain Python numbers: what `read_choice` gives."""


def read_choice(
    given: object,
    *,
    what: str,
    refuse_tuple: bool = False,
    allow_doubles: bool = False,
    error: type[HookLensError] = InputError,
) -> Index:
    """Bring a choice to plain Python numbers; how many entries there are need not be known yet.

    Args:
        given: an int, a slice, a list, tuple, range, array or tensor of ints, or None.
        what: the argument, for messages (`"pos_slice"`, `"edit Zero('blocks.0.hook_mlp_out'): head"`).
        refuse_tuple: a tuple can mean a range at this argument (TransformerLens), so it is refused.
        allow_doubles: an entry may be named several times: nothing is written to the entries, they are copied.
        error: what to raise.

    Raises:
        HookLensError: of the class `error`: another kind, a mask, an empty list, or a number given twice.
    """
    if given is None or type(given) is int:
        return given
    if isinstance(given, slice):
        return _read_slice(given, what, error)
    if isinstance(given, tuple) and refuse_tuple:
        raise _refusal(what, given, " can mean a slice (as in TransformerLens) or a list", error)
    numbers = _plain_numbers(given)
    if isinstance(numbers, bool) or (isinstance(numbers, list) and any(isinstance(one, bool) for one in numbers)):
        hint = " is a mask; give the numbers of its entries, mask.nonzero()[:, 0]" if isinstance(numbers, list) else ""
        raise _refusal(what, given, hint, error)
    if isinstance(numbers, int):
        return numbers
    if not isinstance(numbers, list) or not all(isinstance(one, int) for one in numbers):
        raise _refusal(what, given, "", error)
    if not numbers:
        raise _refusal(what, given, " is empty", error)
    if not allow_doubles:
        _refuse_doubles(numbers, given, what, error)
    return tuple(numbers)


def resolve_choice(
    index: Index,
    size: int,
    *,
    what: str,
    noun: str,
    hint: str = "",
    allow_doubles: bool = False,
    error: type[HookLensError] = InputError,
) -> list[int]:
    """The entries counted from 0, in the order given.

    Args:
        index: what `read_choice` gave.
        size: how many entries the axis has.
        what: the argument, for messages.
        noun: what the entries are (`"heads"`, `"positions run in this call"`).
        hint: ends the message about entries out of range.
        allow_doubles: see `read_choice`.
        error: what to raise.

    Raises:
        HookLensError: of the class `error`: an entry is out of range, or two numbers name one entry. A slice is cut
            to what there is, as Python does.
    """
    if index is None:
        return list(range(size))
    if isinstance(index, slice):
        return list(range(size))[index]
    numbers = (index,) if isinstance(index, int) else index
    outside = [number for number in numbers if not -size <= number < size]
    if outside:
        shown = outside[0] if isinstance(index, int) else outside
        raise error(f"{what}: {shown} out of range; there are {size} {noun}, 0 to {size - 1}{hint}")
    resolved = [number % size for number in numbers]
    if not allow_doubles:
        _refuse_doubles(resolved, index, what, error)
    return resolved


def _read_slice(given: slice, what: str, error: type[HookLensError]) -> slice:
    ends = [_plain_numbers(end) for end in (given.start, given.stop, given.step)]
    wrong = any(isinstance(end, bool) or not (end is None or isinstance(end, int)) for end in ends)
    if wrong or ends[2] == 0:
        raise _refusal(what, given, "", error)
    return slice(*ends)


def _plain_numbers(given: Any) -> Any:
    """Arrays, tensors and their scalars as Python numbers and lists of them; lists item by item."""
    if isinstance(given, Tensor | np.ndarray | np.generic):
        if given.ndim > 1 or not _has_entries(given):
            return None
        return given.tolist()
    if isinstance(given, Sequence) and not isinstance(given, str | bytes):
        return [_plain_numbers(one) for one in given]
    return given


def _has_entries(given: object) -> bool:
    """Whether what is held can be listed: not on the device "meta", nor in a sparse layout."""
    return not (isinstance(given, Tensor) and (given.is_meta or given.layout != torch.strided))


def _refuse_doubles(numbers: Sequence[int], given: object, what: str, error: type[HookLensError]) -> None:
    if len(set(numbers)) < len(numbers):
        doubled = sorted({number for number in numbers if numbers.count(number) > 1})
        raise error(f"{what}: {_show(given)} names {doubled} more than once; name each entry once")


def _refusal(what: str, given: object, hint: str, error: type[HookLensError]) -> HookLensError:
    return error(f"{what}={_show(given)}{hint}; expected an int, a slice, or a list of at least one int")


def _show(given: object) -> str:
    if isinstance(given, Tensor):
        kept = given.tolist() if given.numel() <= 10 and _has_entries(given) else f"Tensor{list(given.shape)}"
        return f"{kept} ({given.dtype})"
    if isinstance(given, torch.dtype | str):
        return repr(given)
    text = repr(given)
    return text if len(text) <= 80 else text[:77] + "..."
