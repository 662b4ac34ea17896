"""The configurations of other libraries, as the adapters read and write them.

An adapter knows another library's words, and stands above the config. It says here what it can do, under the name of
the method of `HookedConfig` that asks for it.
"""

from collections.abc import Callable
from typing import Any

_translators: dict[str, Callable[..., Any]] = {}


def translate_with(method: str, translator: Callable[..., Any]) -> None:
    """Say who does the work of a method; the adapter does, once."""
    _translators[method] = translator


def translate(method: str, *given: Any, **named: Any) -> Any:
    """Do the work of a method."""
    return _translators[method](*given, **named)
