"""Settings of quantisation, taken out of a config: what is wrong with them is collected."""

from collections.abc import Mapping
from typing import Any

from hooklens.arguments import show


class Settings:
    """The settings of one way to quantise.

    Args:
        settings: as the config has them.

    Attributes:
        problems: what is wrong with those that were asked for.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self.problems: list[str] = []

    def get(self, key: str, default: Any) -> Any:
        """A setting; `default` where it is absent or null."""
        found = self._settings.get(key)
        return default if found is None else found

    def choose(self, key: str, choices: tuple[Any, ...], default: Any) -> Any:
        """One of several values of one type."""
        found = self.get(key, default)
        if found not in choices or type(found) is not type(choices[0]):
            self.reject(key, found, " or ".join(map(repr, choices)))
        return found

    def group_size(self, key: str = "group_size", default: int = 128) -> int:
        """How many inputs share a scale; -1: all."""
        found = self.get(key, default)
        if type(found) is not int or (found < 1 and found != -1):
            self.reject(key, found, "a whole number of inputs, or -1 for all")
            return default
        return found

    def block(self, key: str) -> tuple[int, int] | None:
        """Rows and columns that share a scale; None where it is not given."""
        found = self.get(key, None)
        if found is None:
            return None
        if not (isinstance(found, list) and len(found) == 2 and all(type(size) is int and size > 0 for size in found)):
            self.reject(key, found, "two whole numbers, rows and columns")
            return None
        return (found[0], found[1])

    def reject(self, key: str, found: object, expected: str) -> None:
        """Note a value that is not implemented."""
        self.problems.append(f"{key} is {show(found)}; expected {expected}")
