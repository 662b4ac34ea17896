"""The run-time check of annotations that tests/conftest.py puts on every function of the package.

jaxtyping's import hook writes `@jaxtyping.jaxtyped` above each function of `hooklens`. A checked call takes fifty times
what an unchecked one of a small function does, and a function within another is prepared for it anew each time it is
made. So `checked_in_first_calls` stands in `jaxtyped`'s place: in each test the first calls of a kind are checked, and
some of the later ones; the rest go straight to the function. A kind is a function and what its arguments are: their
types, and the dtype and shape of tensors. What annotations say about such arguments holds for all calls of a kind or
for none, so a wrong one is found by whichever test makes a call that shows it, and the thousandth call of a loop costs
next to nothing. Later calls are checked for the sake of what is inside containers and of what is returned.
"""

import functools
import inspect
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jaxtyping
import pytest
from jaxtyping import TypeCheckError, install_import_hook, jaxtyped
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

    beartype(lambda: None)

FIRST_CALLS = 2
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
    """Begin a test, in which no call has been checked."""
    _calls.clear()


def checked_in_first_calls(fn: Any = None, *, typechecker: Callable[[Any], Any]) -> Any:
    """`jaxtyped`, but for calls of a kind that has been checked."""
    if fn is None:
        return functools.partial(checked_in_first_calls, typechecker=typechecker)
    if inspect.isclass(fn):  # The `__init__` of a dataclass.
        return jaxtyped(fn, typechecker=typechecker)

    checked = functools.cache(lambda: jaxtyped(fn, typechecker=typechecker))
    # Functions that are made anew in each call of another have their code in common.
    code = id(fn.__code__)

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        if jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        kind = (code, *map(_kind, args), *kwargs, *map(_kind, kwargs.values()))
        n_before = _calls[kind]
        _calls[kind] = n_before + 1
        if n_before >= FIRST_CALLS and n_before % ONE_IN:
            return fn(*args, **kwargs)
        try:
            return checked()(*args, **kwargs)
        except TypeCheckError:
            # What fails once fails whenever it is called, so that hypothesis can shrink a failing example.
            _calls.pop(kind, None)
            raise

    return call


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
