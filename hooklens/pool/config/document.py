"""A configuration as nested plain values, each of which knows the file and line that it was written on.

YAML is read by `yaml.safe_load`'s own loader, which makes plain values only. What YAML leaves open is refused: a key
that stands twice in one mapping, of which the first would be lost, and aliases that grow without bound.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooklens.files import replace_file
from hooklens.optional import import_package
from hooklens.pool.errors import PoolError

Keys = tuple[str, ...]
"""A path into nested values: keys, and places in lists as texts."""

_MERGE = "tag:yaml.org,2002:merge"
# More values than that are in no configuration of models; aliases of aliases make any number of them.
_MOST_VALUES = 100_000


@dataclass(frozen=True)
class Document:
    """Nested plain values, and where each was written.

    Attributes:
        content: mappings, lists, texts, numbers; from Python also models, dtypes and tokenizers.
        where: what to call it in messages.
        lines: of a file, the line of each value.
    """

    content: Any
    where: str
    lines: Mapping[Keys, int] = field(default_factory=dict)

    def at(self, keys: Keys) -> str:
        """Where a value stands, for messages: `pool.yaml:3: models.math`."""
        name = ".".join(keys)
        line = self.lines.get(keys)
        place = self.where if line is None else f"{self.where}:{line}"
        return f"{place}: {name}" if name else place

    def inside(self, key: str) -> "Document":
        """The document that is the value of a key."""
        lines = {keys[1:]: line for keys, line in self.lines.items() if keys[:1] == (key,)}
        return Document(self.content[key], self.where, lines)


def read_yaml(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        PoolError: it cannot be read, is no YAML of plain values, or has a key twice in one mapping, with both lines.
    """
    yaml = import_package("yaml")
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PoolError(f"{path}: cannot be read ({error}); expected a YAML file") from error
    survey = _Survey(yaml, str(path))
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                raise PoolError(f"{path}: is empty; expected a mapping with the key 'models'")
            survey.visit(node, ())
            if survey.problems:
                raise PoolError(f"{path}: {'; '.join(survey.problems)}")
            content = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise PoolError(f"{path}: cannot be read as YAML of plain values: {error}") from error
    except RecursionError as error:
        raise PoolError(f"{path}: cannot be read as YAML: nested too deeply") from error
    return Document(content, str(path), survey.lines)


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values as YAML, in their order; a file that is there is replaced in one step.

    Raises:
        PoolError: the file cannot be written.
    """
    text = import_package("yaml").safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    try:
        with replace_file(path.expanduser()) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PoolError(f"{path}: cannot be written ({error})") from error


def as_plain(value: Any) -> Any:
    """A configuration in mappings and lists of its own; what is neither stays what it is, a path becomes text."""
    if isinstance(value, Mapping):
        return {key: as_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple) or type(value).__module__.startswith("omegaconf"):
        return [as_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


class _Survey:
    """Goes through the nodes of a YAML file, and notes lines and problems."""

    def __init__(self, yaml: Any, where: str) -> None:
        self._yaml = yaml
        self._where = where
        self._above: set[int] = set()
        self._n_values = 0
        self.lines: dict[Keys, int] = {}
        self.problems: list[str] = []

    def visit(self, node: Any, keys: Keys) -> None:
        """Go through a node and all inside it."""
        line = node.start_mark.line + 1
        self._n_values += 1
        if self._n_values > _MOST_VALUES:
            raise PoolError(f"{self._where}: its aliases stand for more than {_MOST_VALUES} values")
        if id(node) in self._above:
            raise PoolError(f"{self._where}:{line}: an alias of a value stands inside that value")
        self.lines.setdefault(keys, line)
        self._above.add(id(node))
        if isinstance(node, self._yaml.MappingNode):
            self._visit_mapping(node, keys)
        elif isinstance(node, self._yaml.SequenceNode):
            for place, item in enumerate(node.value):
                self.visit(item, (*keys, str(place)))
        self._above.discard(id(node))

    def _visit_mapping(self, node: Any, keys: Keys) -> None:
        first: dict[tuple[str, str], int] = {}
        merged: list[Any] = []
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, self._yaml.SequenceNode) else [value]
                continue
            if not isinstance(key, self._yaml.ScalarNode):
                self.problems.append(f"line {line}: a key is a {key.id}, expected a text")
                continue
            inside = (*keys, key.value)
            if (key.tag, key.value) in first:
                lines = f"{first[key.tag, key.value]} and {line}"
                self.problems.append(f"{'.'.join(inside)!r} stands twice, on lines {lines}; keep one")
                continue
            first[key.tag, key.value] = line
            self.lines.setdefault(inside, line)
            self.visit(value, inside)
        # What stands here takes the place of what is merged in.
        for value in merged:
            self.visit(value, keys)
