"""Arguments of public functions, brought to plain values or refused in words, before any work.

A reader takes what a caller gave and returns the plain value: `read_flag(given, what="verbose")`. A method declares the
readers of its arguments beside its signature, and is then handed what they return:

    @reads(return_type=partial(read_one_of, options=("logits", "loss", None)), device=optional(read_device))
    def run(self, input, *, return_type="logits", device=None): ...

Numpy's numbers and switches count as Python's. Nothing counts as true or false by accident.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from hooklens.arguments.signature import Error as Error
from hooklens.arguments.signature import Reader as Reader
from hooklens.arguments.signature import explains_keywords as explains_keywords
from hooklens.arguments.signature import reads as reads
from hooklens.errors import HookLensError, InputError

MOST_ENTRIES = 2**31 - 1
"""More rows, positions or files than that are a slip."""

_SHOWN = 80
_NUMBERS = (type(None), bool, int, float, complex, np.generic)
_PLAIN = (
    *_NUMBERS,
    str,
    bytes,
    list,
    tuple,
    dict,
    set,
    frozenset,
    range,
    slice,
    torch.dtype,
    torch.device,
    os.PathLike,
)


def optional(reader: Reader) -> Reader:
    """A reader that lets None pass."""

    def read(given: object, *, what: str, error: Error = InputError) -> Any:
        if given is None:
            return None
        try:
            return reader(given, what=what, error=error)
        except error as found:
            raise error(f"{found}, or None") from found.__cause__

    return read


def read_flag(given: object, *, what: str, error: Error = InputError) -> bool:
    """A switch: True or False, numpy's included.

    Raises:
        HookLensError: anything else, "no" and 0 included, which would count as true or false by accident.
    """
    if type(given) is bool:
        return given
    if isinstance(given, np.bool_):
        return bool(given)
    raise refusal(given, what, "True or False", error)


def read_int(
    given: object, *, what: str, least: int | None = None, most: int | None = None, error: Error = InputError
) -> int:
    """A whole number within bounds: an int, a numpy integer, or an array or tensor of one without axes.

    Raises:
        HookLensError: another kind of value (booleans and floats are), or out of bounds.
    """
    number = given if type(given) is int else _whole(given)
    if number is None or (least is not None and number < least) or (most is not None and number > most):
        raise refusal(given, what, f"a whole number{_bounds(least, most)}", error)
    return number


def _whole(given: Any) -> int | None:
    if isinstance(given, bool):
        return None
    if isinstance(given, int | np.integer):
        return int(given)
    if isinstance(given, Tensor):
        is_whole = not (given.dtype == torch.bool or given.is_floating_point() or given.is_complex())
        return int(given) if given.ndim == 0 and is_whole and not given.is_meta and not given.is_quantized else None
    if isinstance(given, np.ndarray) and given.ndim == 0 and given.dtype.kind in "iu":
        return int(given)
    return None


def _bounds(least: int | None, most: int | None) -> str:
    if most is None or (most >= MOST_ENTRIES and least is not None):
        limit = "" if most is None else f", below {_power_of_two(most + 1)}"
        return limit if least is None else f" >= {least}{limit}"
    return f" <= {most}" if least is None else f", {least} to {most}"


def _power_of_two(number: int) -> str:
    exponent = number.bit_length() - 1
    return f"2**{exponent}" if number == 2**exponent and exponent > 9 else str(number)


def read_seed(given: object, *, what: str, error: Error = InputError) -> int:
    """A seed: a whole number that torch's generators take.

    Raises:
        HookLensError: anything else.
    """
    return read_int(given, what=what, least=-(2**63), most=2**64 - 1, error=error)


def read_number(
    given: object,
    *,
    what: str,
    expected: str,
    allows: Callable[[float], bool] = lambda number: True,
    error: Error = InputError,
) -> float:
    """A finite number: an int or a float, Python's or numpy's.

    Args:
        given: what a caller gave.
        what: the argument, for messages.
        expected: which numbers are allowed, for messages.
        allows: which ones are.
        error: what to raise.

    Raises:
        HookLensError: another kind of value (booleans and texts are), or a number that is not allowed.
    """
    if not isinstance(given, bool) and isinstance(given, int | float | np.integer | np.floating):
        try:
            number = float(given)
        except OverflowError:
            number = math.inf
        if math.isfinite(number) and allows(number):
            return number
    raise refusal(given, what, expected, error)


def read_one_of(given: object, *, what: str, options: Sequence[str | None], error: Error = InputError) -> Any:
    """One of several words, or None where that is one of them.

    Raises:
        HookLensError: anything else.
    """
    # Of other types, tensors and arrays among them, some say that they are equal to a text, entry by entry.
    if (given is None or isinstance(given, str)) and given in options:
        return given
    listed = [repr(option) for option in options]
    raise refusal(given, what, f"{', '.join(listed[:-1])} or {listed[-1]}", error)


def read_text(given: object, *, what: str, error: Error = InputError) -> str:
    """A text that is not empty.

    Raises:
        HookLensError: an empty one, or anything else.
    """
    if isinstance(given, str) and given:
        return given
    raise refusal(given, what, "a text that is not empty", error)


def read_path(given: object, *, what: str, error: Error = InputError) -> Path:
    """A path, as text or as an object of one.

    Raises:
        HookLensError: an empty text, which would name the working directory, or no path at all.
    """
    named = os.fspath(given) if isinstance(given, os.PathLike) else given
    if not isinstance(named, str) or not named or "\0" in named:
        raise refusal(given, what, "a path, as text or a pathlib.Path", error)
    return Path(named)


def read_dtype(given: object, *, what: str, error: Error = InputError) -> torch.dtype:
    """A floating dtype that tensors can be converted to, or the name of one (`"bfloat16"`).

    Raises:
        HookLensError: anything else.
    """
    dtype = getattr(torch, given.removeprefix("torch."), None) if isinstance(given, str) else given
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or not _holds_numbers(dtype):
        raise refusal(given, what, "a floating dtype, as torch.bfloat16", error)
    return dtype


@functools.cache
def _holds_numbers(dtype: torch.dtype) -> bool:
    """Whether numbers can be converted; torch has dtypes that only name a layout."""
    try:
        return bool(torch.ones(1).to(dtype).to(torch.float32) == 1)
    except RuntimeError:
        return False


def read_device(given: object, *, what: str, error: Error = InputError) -> torch.device:
    """A device that tensors can lie on.

    Raises:
        HookLensError: no such device, or not on this machine.
    """
    if isinstance(given, bool) or not isinstance(given, str | torch.device | int):
        hint = "; a dtype is given by name, dtype=" if isinstance(given, torch.dtype) else ""
        raise refusal(given, what, f"a torch.device or its name, as 'cuda:0'{hint}", error)
    try:
        return torch.empty(0, device=given).device
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, ValueError, TypeError, OverflowError) as reason:
        first_line = str(reason).partition("\n")[0]
        raise error(f"{what} is {given!r}, which cannot be used: {first_line}") from reason


def read_tensor(given: object, *, what: str, expected: str = "a tensor", error: Error = InputError) -> Tensor:
    """A tensor whose values can be looked at.

    Raises:
        HookLensError: another kind of value, a tensor on the device "meta", or one that is not laid out entry by entry.
    """
    if not isinstance(given, Tensor):
        raise refusal(given, what, expected, error)
    if given.is_meta or given.layout != torch.strided or given.is_quantized:
        why = "without values (device 'meta')" if given.is_meta else f"of layout {given.layout}"
        raise error(f"{what} is a tensor {why}, expected {expected} that holds its entries one by one")
    return given


def read_numbers(given: object, *, what: str, expected: str, error: Error = InputError) -> Tensor:
    """A tensor whose values can be looked at, also from a list or an array of numbers.

    Raises:
        HookLensError: another kind of value, or one whose values cannot be looked at.
    """
    if isinstance(given, list | tuple | np.ndarray):
        try:
            given = torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise refusal(given, what, expected, error) from None
    return read_tensor(given, what=what, expected=expected, error=error)


def is_function(given: object) -> TypeGuard[Callable[..., Any]]:
    """Whether something can be called on a tensor or a name; a class makes objects of itself."""
    return callable(given) and not isinstance(given, type)


def read_function(given: object, *, what: str, expected: str, error: Error = InputError) -> Any:
    """A function.

    Raises:
        HookLensError: anything else, a class included.
    """
    if is_function(given):
        return given
    raise refusal(given, what, expected, error)


def require(
    given: object, *, kind: type | tuple[type, ...], what: str, expected: str, error: Error = InputError
) -> Any:
    """What a caller gave, where it is of a kind.

    Raises:
        HookLensError: it is not.
    """
    if isinstance(given, kind) and not (isinstance(given, bool) and kind is int):
        return given
    raise refusal(given, what, expected, error)


def refusal(given: object, what: str, expected: str, error: Error = InputError) -> HookLensError:
    """The error for an argument: its name, what was found, and what was expected."""
    return error(f"{what} is {show(given)}, expected {expected}")


def show(given: object) -> str:
    """A value for a message, in one short line."""
    if isinstance(given, Tensor):
        return f"a tensor {list(given.shape)} of {given.dtype}"
    if isinstance(given, np.ndarray):
        return f"an array {list(given.shape)} of {given.dtype}"
    if isinstance(given, type):
        return f"the class {given.__name__}"
    if isinstance(given, _PLAIN):
        text = " ".join(repr(given).split())
        return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
    name = type(given).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
