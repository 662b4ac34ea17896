"""Readers before a function: its arguments are handed to it as the plain values that readers make of them."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from hooklens.arguments.foreign import explain_keyword
from hooklens.errors import HookLensError, InputError

Reader = Callable[..., Any]
"""A function `(given, *, what, error)` to a plain value, which raises `error` with a text that begins with `what`."""

Error = type[HookLensError]
Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")
Made = TypeVar("Made")


def reads(
    error: Error = InputError, /, **readers: Reader
) -> Callable[[Callable[Parameters, Returned]], Callable[Parameters, Returned]]:
    """Put readers before a method: it is handed what they return, and all refusals are raised as one.

    Defaults are not read, so a plain call of a method costs nothing. Keywords that the function hands on
    (`**keywords`) can have readers, too. An argument that the method does not take is a `TypeError`.

    Args:
        error: what the method raises.
        **readers: by the name of the argument.

    Raises:
        HookLensError: by the method, what its readers refuse.
    """

    def decorate(function: Callable[Parameters, Returned]) -> Callable[Parameters, Returned]:
        signature = _Signature(function, readers, error)

        @functools.wraps(function)
        def checked(*arguments: Any, **keywords: Any) -> Returned:
            if keywords or len(arguments) > signature.n_unread:
                arguments, keywords = signature.read(arguments, keywords)
            return function(*arguments, **keywords)

        return checked

    return decorate


def explains_keywords(cls: type[Made]) -> type[Made]:
    """Let a class that is called with a keyword of another library name its own; see `hooklens.arguments.foreign`."""
    setattr(cls, "__init__", reads()(cls.__init__))  # noqa: B010
    return cls


class _Signature:
    """The arguments of a method and their readers."""

    def __init__(self, function: Callable[..., Any], readers: Mapping[str, Reader], error: Error) -> None:
        # Read from the code: `inspect.signature` takes dozens of calls, and every public function comes here on import.
        code = inspect.unwrap(function).__code__
        positional = code.co_varnames[: code.co_argcount]
        parameters = frozenset(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])
        hands_on = bool(code.co_flags & inspect.CO_VARKEYWORDS)
        assert hands_on or readers.keys() <= parameters, f"{function} takes no {readers.keys() - parameters}"
        self._subject = function.__qualname__
        self._known = None if hands_on else parameters
        self._readers = readers
        self._error = error
        # A method's first argument is the object itself; a function's may have a reader.
        self.n_unread = 0 if next(iter(positional), None) in readers else 1
        self._places = [
            (place, name)
            for place, name in enumerate(positional)
            if place >= code.co_posonlyargcount and name in readers
        ]

    def read(self, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments as plain values.

        Raises:
            HookLensError: what readers refuse.
            TypeError: a keyword that the method does not take.
        """
        problems: list[str] = []
        if self._places:
            given = list(arguments)
            for place, name in self._places:
                if place < len(given):
                    given[place] = self._try(self._readers[name], given[place], name, problems)
            arguments = tuple(given)
        read = {}
        for name, value in keywords.items():
            reader = self._readers.get(name)
            read[name] = value if reader is None else self._try(reader, value, name, problems)
            if reader is None and self._known is not None and name not in self._known:
                hint = explain_keyword(name, self._known)
                raise TypeError(f"{self._subject}() got an unexpected keyword argument {name!r}.{hint}")
        if problems:
            raise self._error("; ".join(problems))
        return arguments, read

    def _try(self, reader: Reader, given: Any, name: str, problems: list[str]) -> Any:
        try:
            return reader(given, what=name, error=self._error)
        except self._error as found:
            problems.append(str(found))
            return None
