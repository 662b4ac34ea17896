"""Checks of configuration values: what was found, what was expected."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from hooklens.errors import ConfigError

Made = TypeVar("Made")


def read_fields(kind: Callable[..., Made], what: str, values: object) -> Made:
    """Build a part of a configuration from its fields by name.

    Raises:
        ConfigError: unknown or missing fields, or no fields at all.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"config: {what} is {values!r}; expected its fields by name")
    try:
        return kind(**values)
    except TypeError as error:
        # Python's own words name the field.
        raise ConfigError(f"config: {what}: {error}") from error


def check_choice(what: str, value: object, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ConfigError: it is not.
    """
    if value not in choices:
        raise ConfigError(f"{what} is {value!r}; expected one of {', '.join(map(repr, choices))}")


def check_numbers(owner: str, values: Mapping[str, object], *, at_least: float | None = None) -> None:
    """Refuse what is no finite number above 0 (or from `at_least` on); None is absent, and fine.

    Raises:
        ConfigError: lists all that are not.
    """
    found = [f"{name}={value!r}" for name, value in values.items() if not _is_number(value, at_least)]
    if found:
        bound = "above 0" if at_least is None else f">= {at_least:g}"
        raise ConfigError(f"{owner}: {', '.join(found)}; expected finite numbers {bound}")


def check_present(owner: str, values: Mapping[str, object]) -> None:
    """Refuse None, for values that cannot be absent.

    Raises:
        ConfigError: lists all that are None.
    """
    found = [name for name, value in values.items() if value is None]
    if found:
        raise ConfigError(f"{owner}: {', '.join(found)} must be given, found None")


def check_flags(owner: str, values: Mapping[str, object]) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ConfigError: lists all that are not.
    """
    found = [f"{name}={value!r}" for name, value in values.items() if not isinstance(value, bool)]
    if found:
        raise ConfigError(f"{owner}: {', '.join(found)}; expected True or False")


def check_kind(what: str, value: object, kind: type, *, by_layer: bool = True) -> None:
    """Refuse what is neither of a class nor None (absent) nor, where layers may differ, a tuple of such.

    Raises:
        ConfigError: it is not.
    """
    each = value if by_layer and isinstance(value, tuple) else (value,)
    if not all(one is None or isinstance(one, kind) for one in each):
        also = ", or a tuple with one for each layer" if by_layer else ""
        raise ConfigError(f"{what}={value!r}; expected {kind.__name__}(...) or None{also}")


def refuse(problems: Sequence[str], owner: str) -> None:
    """Refuse a combination of values, with all that is wrong with it.

    Raises:
        ConfigError: there are problems.
    """
    if len(problems) == 1:
        raise ConfigError(f"{owner}: {problems[0]}")
    if problems:
        raise ConfigError(f"{owner}:\n- " + "\n- ".join(problems))


def check_counts(owner: str, values: Mapping[str, object], *, at_least: int = 1) -> None:
    """Refuse what is no whole number from `at_least` on; None is absent, and fine.

    Raises:
        ConfigError: lists all that are not.
    """
    found = [
        f"{name}={value!r}"
        for name, value in values.items()
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < at_least)
    ]
    if found:
        raise ConfigError(f"{owner}: {', '.join(found)}; expected whole numbers from {at_least} on")


def _is_number(value: object, at_least: float | None) -> bool:
    if value is None:
        return True
    # Also of whole numbers some are too large to compute with.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        return False
    return value > 0 if at_least is None else value >= at_least
