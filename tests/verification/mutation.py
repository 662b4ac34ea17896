"""Small faults put into the engine's own code, one function at a time."""

import ast
import functools
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from hooklens.model.attention.rotary import rotary_tables


@dataclass(frozen=True)
class Mutant:
    """A fault.

    Attributes:
        fault: what goes wrong, in a sentence.
        target: `"module:function"` or `"module:Class.method"`, below `hooklens`.
        changes: source text, found exactly once in the function, and what stands there instead.
        network: the name of the network that shows it.
        stage: where `verify` is expected to notice; looked at first.
    """

    fault: str
    target: str
    changes: tuple[tuple[str, str], ...]
    network: str = "learned"
    stage: str = "shown tensors"


@contextmanager
def put_in(mutant: Mutant) -> Iterator[None]:
    """Run the function's changed source in its place, for whoever holds the function.

    Raises:
        AssertionError: the source is not what the mutant changes: it has to be written anew.
    """
    function = _find(mutant.target)
    changed = _compile(function, _change(function, mutant), mutant)
    original = function.__code__
    assert changed.co_freevars == original.co_freevars, f"{mutant.target}: the changed source closes over other names"
    rotary_tables.cache_clear()
    function.__code__ = changed
    try:
        yield
    finally:
        function.__code__ = original
        rotary_tables.cache_clear()


def _find(target: str) -> FunctionType:
    """The function itself, below the wrappers of decorators and of the shape checks."""
    module_name, path = target.split(":")
    holder: Any = importlib.import_module(f"hooklens.{module_name}")
    *outer, name = path.split(".")
    for part in outer:
        holder = getattr(holder, part)
    found = inspect.getattr_static(holder, name)
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, functools.cached_property):
        found = found.func
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    function = inspect.unwrap(found)
    assert isinstance(function, FunctionType), f"{target} is a {type(function).__name__}"
    return function


def _change(function: FunctionType, mutant: Mutant) -> str:
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in mutant.changes:
        n = source.count(old)
        assert n == 1, f"{mutant.target} has the text {old!r} {n} times; the mutant {mutant.fault!r} no longer applies"
        source = source.replace(old, new)
    return source


def _compile(function: FunctionType, source: str, mutant: Mutant) -> Any:
    tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = []
    # Names that the original closes over (`__class__`, for `super()`) have to be closed over here, too.
    names = ", ".join(function.__code__.co_freevars)
    outer = ast.parse(f"from __future__ import annotations\ndef outer({names}):\n    pass\n    return {tree.name}")
    maker = outer.body[1]
    assert isinstance(maker, ast.FunctionDef)
    maker.body[0] = tree
    scope = dict(function.__globals__)
    exec(compile(ast.fix_missing_locations(outer), f"<mutant of {mutant.target}>", "exec"), scope)
    make: Callable[..., FunctionType] = scope["outer"]
    return make(*([None] * len(function.__code__.co_freevars))).__code__
