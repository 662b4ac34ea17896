"""The run-time check of annotations that tests/conftest.py puts on every function of the package.

jaxtyping's import hook writes `@jaxtyping.jaxtyped` above each function of `hooklens`. A checked call takes fifty times
what an unchecked one of a small function does, and a function within another is prepared for it anew each time it is
made. So `checked_in_first_calls` stands in `jaxtyped`'s place: in each file of tests the first call of a kind is
checked, and some of the later ones; the rest go straight to the function. A kind is a function and what its arguments
are: their types, and, where annotations name axes, the dtype and shape of tensors. What annotations say about such
arguments holds for all calls of a kind or for none, so a wrong one is found by whichever test makes a call that shows
it, and the thousandth call costs next to nothing. Later calls are checked for the sake of what is inside containers and
of what is returned.

With small models this is much of what a test costs, so what is done in every call is kept short.
"""

import functools
import inspect
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any, ForwardRef, Literal, ParamSpec, TypeVar, get_args, get_origin

import jaxtyping
import pytest
from jaxtyping import AbstractArray, TypeCheckError, install_import_hook, jaxtyped
from torch import Tensor

# Its frames stand in jaxtyping's place, which warnings pass over on their way to the line of the call. `torch.compile`
# looks the module up by that name.
__name__ = "jaxtyping.first_calls"
sys.modules[__name__] = sys.modules["tests.annotations"]

# Which item of a list is looked at is drawn by a generator that is taken when beartype is imported. Were it Python's
# own, a check would change what the code under test draws.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(random, "getrandbits", random.Random(0).getrandbits)
    from beartype import BeartypeConf, beartype
    from beartype.roar import BeartypeCallHintViolation

    beartype(lambda: None)

FIRST_CALLS = 1
ONE_IN = 61  # A prime, so that of what comes in turns (layers, rows) each has its turn.

# An int is a float here as it is for mypy (PEP 484's numeric tower).
check_calls = beartype(conf=BeartypeConf(is_pep484_tower=True))

_calls: defaultdict[tuple[Any, ...], int] = defaultdict(int)


def check_annotations(package: str) -> Any:
    """Check calls of the functions of a package that is yet to be imported; `with` ends it for later imports."""
    # The decorator that the hook writes is looked up when a module runs.
    jaxtyping.jaxtyped = checked_in_first_calls
    return install_import_hook(package, "tests.annotations.check_calls")


def count_anew() -> None:
    """Begin a file of tests, in which no call has been checked."""
    _calls.clear()


def checked_in_first_calls(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """`jaxtyped`, but for calls of a kind that has been checked."""
    if fn is None:
        return functools.partial(checked_in_first_calls, typechecker=typechecker)
    if inspect.isclass(fn):
        # Those of fields are made with the class; any other has been seen as a method.
        if is_dataclass(fn) and not _is_checked(fn.__init__):
            fn.__init__ = checked_in_first_calls(fn.__init__, typechecker=typechecker)
        return fn

    hints = getattr(fn, "__annotations__", {}).values()
    # jaxtyping's account of axes takes twenty times what a check does; a function that names none goes without it, but
    # for a generator, which would then look at what it is given only once it is asked for something.
    with_axes = inspect.isgeneratorfunction(fn) or any(map(_may_have_axes, hints))
    kind_of = _kind if with_axes else type
    checked = functools.cache(lambda: jaxtyped(fn, typechecker=typechecker) if with_axes else typechecker(fn))
    # Functions that are made anew in each call of another have their code in common.
    code = id(fn.__code__)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        kind: tuple[Any, ...] = (code, *map(kind_of, args))
        if kwargs:
            kind = (*kind, *kwargs, *map(kind_of, kwargs.values()))
        n_before = _calls[kind]
        _calls[kind] = n_before + 1
        if n_before % ONE_IN:
            return fn(*args, **kwargs)
        try:
            return checked()(*args, **kwargs)
        except (TypeCheckError, BeartypeCallHintViolation) as error:
            # What fails once fails whenever it is called, so that hypothesis can shrink a failing example.
            _calls.pop(kind, None)
            if isinstance(error, TypeCheckError):
                raise
            raise TypeCheckError(str(error)) from error

    return call


def _may_have_axes(hint: Any) -> bool:
    """Whether an annotation names axes, or is a text that only its module can read."""
    if isinstance(hint, str | ForwardRef | TypeVar | ParamSpec):
        return True
    if isinstance(hint, list | tuple):
        return any(map(_may_have_axes, hint))
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return get_origin(hint) is not Literal and _may_have_axes(get_args(hint))


def _is_checked(fn: Any) -> bool:
    return getattr(fn, "__globals__", None) is globals()


def _kind(argument: Any) -> Any:
    return (argument.dtype, argument.shape) if isinstance(argument, Tensor) else type(argument)


@contextmanager
def unchecked() -> Iterator[None]:
    """Calls as users make them, whose mistakes the package itself has to find."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
