"""Values taken out of a `config.json`: each asked for by key and type, all that is wrong collected."""

import math
from collections.abc import Mapping
from typing import Any

from hooklens.arguments import MOST_ENTRIES, show

# Stands for "there is no default": transformers' own defaults for sizes belong to one particular checkpoint.
REQUIRED: Any = object()
# More layers are in no network, and a list with an entry for each should stay one.
_MOST_LAYERS = 100_000
_KIND_WORDS = {int: "int", float: "float", bool: "true or false", str: "a text", dict: "an object"}


def _is_exactly(value: object, kind: type) -> bool:
    """Whether the value is of this very type: `isinstance` takes a bool for an int."""
    return type(value) is kind


class ConfigReader:
    """Takes values out of a `config.json`, remembering which keys were used and all that is wrong.

    Attributes:
        problems: one sentence per missing, mistyped or unsupported value.
        used: keys that somebody asked for.
        impossible: why a part could not make its fields of values that are well-formed; empty where none failed.
    """

    def __init__(self, config: Mapping[str, Any], *, path: str = "") -> None:
        self._config = config
        self._path = path
        self._nested: list[ConfigReader] = []
        self.problems: list[str] = []
        self.used: set[str] = set()
        self.impossible = ""

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        self.used.add(key)
        return self._config.get(key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the key is there and null."""
        return key in self._config and self._config[key] is None

    def get(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`; `default` where it is absent or null. What is wrong goes into `problems`."""
        if not self.has(key):
            if default is not REQUIRED:
                return default
            self.problems.append(f"{self._path}{key} is missing")
            return kind(1) if kind is not dict else {}
        value: Any = self._config[key]
        if kind is float and type(value) is int and abs(value) <= MOST_ENTRIES:
            value = float(value)
        if not _is_exactly(value, kind):
            self.problems.append(f"{self._path}{key} is {show(value)}; expected {_KIND_WORDS.get(kind, kind.__name__)}")
        elif kind is int and not 0 <= value <= MOST_ENTRIES:
            self.problems.append(f"{self._path}{key} is {show(value)}; expected a size, at least 0 and below 2**31")
        elif kind is float and not math.isfinite(value):
            self.problems.append(f"{self._path}{key} is {show(value)}; expected a finite number")
        else:
            return value
        return default if default is not REQUIRED else kind(1)

    def entries(self, key: str, kind: type) -> list[Any]:
        """The list under `key`. What is wrong goes into `problems`."""
        value: Any = self._config.get(key)
        self.used.add(key)
        allowed = (int, float) if kind is float else (kind,)
        if isinstance(value, list) and all(type(one) in allowed for one in value):
            return value
        word = _KIND_WORDS.get(kind, kind.__name__)
        found = "missing" if value is None else show(value)
        self.problems.append(f"{self._path}{key} is {found}; expected a list with {word} in each place")
        return []

    def by_layer(self, key: str, kind: type, n_layers: int) -> list[Any] | None:
        """The list under `key`, which has an entry for each layer; None where it is absent or null."""
        if not self.has(key):
            return None
        value = self.entries(key, kind)
        if value and len(value) != n_layers:
            self.problems.append(
                f"{self._path}{key} has {len(value)} entries; expected one for each of {n_layers} layers"
            )
        return value if len(value) == n_layers else None

    def layers(self, n_layers: int) -> range:
        """The layers, of which there are not absurdly many."""
        if n_layers > _MOST_LAYERS:
            self.problems.append(f"{n_layers} layers are more than a network has")
            return range(0)
        return range(n_layers)

    def kind_is(self, kind: str) -> bool:
        """Whether the object names itself so, in the old spelling or the new one."""
        self.used.update({"rope_type", "type"})
        return kind in (self._config.get("rope_type"), self._config.get("type"))

    def nested(self, key: str, default: Mapping[str, Any] | None = None) -> "ConfigReader":
        """A reader of the object under `key`, or of `default` where that is empty, that reports into this one."""
        reader = ConfigReader(self.get(key, dict, {}) or default or {}, path=f"{self._path}{key}.")
        reader.problems = self.problems
        self._nested.append(reader)
        return reader

    def reject(self, key: str, expected: str) -> None:
        """Record that the value of `key` is not implemented."""
        self.problems.append(f"{self._path}{key} is {show(self._config.get(key))}; expected {expected}")

    def unused(self) -> list[str]:
        """Full names of the keys that nobody asked for, those of nested objects included."""
        own = [f"{self._path}{key}" for key in self._config if key not in self.used]
        return own + [key for reader in self._nested for key in reader.unused()]
