"""The files of results: safetensors, with what the values are labelled by as JSON in the metadata.

Each is written whole or not at all (`hooklens.files`), and read with every key and every tensor checked, so that a
damaged file is an error that names what is wrong in it.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hooklens.arguments import show
from hooklens.errors import CheckpointError
from hooklens.files import read_safetensors, write_safetensors


class Expected(NamedTuple):
    """What the value of a key has to be: in words, and as a test of what JSON gives."""

    words: str
    holds: Callable[[Any], bool]


TEXT = Expected("a text", lambda found: isinstance(found, str))
NUMBER = Expected("a number", lambda found: _is_number(found, float))
WHOLE_NUMBER = Expected("a whole number", lambda found: _is_number(found, int))
LABELS = Expected(
    "a list of texts and whole numbers",
    lambda found: is_list(found, lambda label: TEXT.holds(label) or WHOLE_NUMBER.holds(label)),
)
DIRECTION = Expected("'denoise' or 'noise'", lambda found: TEXT.holds(found) and found in ("denoise", "noise"))


def is_list(found: Any, holds: Callable[[Any], bool]) -> bool:
    """Whether JSON gave a list of which something holds for each entry."""
    return isinstance(found, list) and all(holds(one) for one in found)


def expect_numbers_of(kind: type) -> Expected:
    """A mapping with the fields of a dataclass of numbers; those with a default may be missing, as in older files."""
    types = {field.name: field.type for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}

    def holds(found: Any) -> bool:
        return (
            isinstance(found, dict)
            and needed <= found.keys() <= types.keys()
            and all(_is_number(number, types[name]) for name, number in found.items())
        )

    return Expected(f"the numbers {', '.join(types)}", holds)


def _is_number(found: Any, kind: object) -> bool:
    allowed = int if kind is int else (int, float)
    return isinstance(found, allowed) and not isinstance(found, bool)


class Expectation(NamedTuple):
    """What a tensor has to be.

    Attributes:
        shape: its axes: sizes, or names of those that a file's tensors share, sized by the first that has them.
        dtype: its dtype; None: a floating one, the same for all tensors of a file of which none is given.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class ResultFile:
    """A kind of file.

    Attributes:
        format: what marks a file as one of this kind.
        contents: what it holds, as errors call it: `"a sweep"`.
        writer: what writes it, as errors call it: `"SweepResult.save"`.
        keys: by key of the description, what is expected of the value.
    """

    format: str
    contents: str
    writer: str
    keys: Mapping[str, Expected]

    def write(self, path: str | Path, tensors: Mapping[str, Tensor], described: Mapping[str, Any]) -> None:
        """Write a result's tensors and what describes them.

        Raises:
            CheckpointError: the file cannot be written, or a label is no text or number.
        """
        try:
            write_safetensors(path, tensors, {"format": self.format, "description": json.dumps(described)})
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"cannot write {self.contents} to {path}: {error}") from error

    def read(
        self, path: str | Path, expect: Callable[[dict[str, Any], dict[str, Tensor]], Mapping[str, Expectation]]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `write` wrote, checked.

        Args:
            path: the file.
            expect: what is expected of the tensors, by a description that is as it should be and what tensors there
                are. Those that an axis or the dtype is to be taken from come first.

        Returns:
            The tensors, and the description.

        Raises:
            CheckpointError: the file is missing, damaged, or of another kind; all that is wrong is named.
        """
        try:
            tensors, metadata = read_safetensors(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.contents} from {path}: {error}") from error
        if metadata.get("format") != self.format:
            raise CheckpointError(f"{path} does not hold {self.contents}; expected a file that {self.writer} wrote")
        try:
            described = json.loads(metadata.get("description", ""))
        except (ValueError, RecursionError) as error:
            raise self.damage(path, [f"key 'description' is no JSON ({error})"]) from error
        if not isinstance(described, dict):
            raise self.damage(path, [f"key 'description' is {show(described)}, expected a mapping"])
        if wrong := list(self._wrong_keys(described)):
            raise self.damage(path, wrong)
        if wrong := list(_wrong_tensors(tensors, expect(described, tensors))):
            raise self.damage(path, wrong)
        return tensors, described

    def damage(self, path: str | Path, wrong: Iterable[str]) -> CheckpointError:
        """The error for a file with something wrong in it."""
        return CheckpointError(f"{path} is damaged: {'; '.join(wrong)}")

    def _wrong_keys(self, described: Mapping[str, Any]) -> Iterable[str]:
        for key, (words, holds) in self.keys.items():
            if key not in described:
                yield f"key {key!r} is missing, expected {words}"
            elif not holds(described[key]):
                yield f"key {key!r} is {show(described[key])}, expected {words}"
        for key in described.keys() - self.keys.keys():
            yield f"key {key!r} is not known"


def _wrong_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Expectation]) -> Iterable[str]:
    if tensors.keys() != expected.keys():
        yield f"it holds the tensors {sorted(tensors)}, expected {sorted(expected)}"
        return
    sizes: dict[str, int] = {}
    dtype: torch.dtype | None = None
    for name, (shape, given) in expected.items():
        found = tensors[name]
        if given is None and dtype is None and found.is_floating_point():
            dtype = found.dtype
        wanted = given or dtype
        if len(shape) == found.ndim:
            for axis, size in zip(shape, found.shape, strict=True):
                if isinstance(axis, str):
                    sizes.setdefault(axis, size)
        axes = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in shape]
        if list(found.shape) != axes or found.dtype != wanted:
            kind = "floating numbers" if wanted is None else wanted
            yield f"key {name!r} is {show(found)}, expected [{' '.join(map(str, axes))}] of {kind}"
