"""What is merged: the tensors of several models under the same names, held against each other before any work.

A model's tensors are a mapping, which may read each tensor from a file when it is asked for it: no more than one tensor
of each model is looked at at a time. Two names of one mapping that share memory are one weight, counted once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.errors import InputError, join_names

Tensors = Mapping[str, Tensor]
"""A model's tensors by name; may be lazy."""

_MOST_LISTED = 12


@dataclass(frozen=True)
class Operands:
    """Models whose tensors have the same names and shapes; floating dtypes may differ, and the first model's counts.

    Attributes:
        models: the tensors of each.
        names: of the weights that are merged, each weight once.
        kept: of what is no floating-point tensor, which is the same in all models.
        same: for a name that shares its memory with one of `names`, that one.
    """

    models: tuple[Tensors, ...]
    names: tuple[str, ...]
    kept: tuple[str, ...]
    same: Mapping[str, str]

    @classmethod
    def of(cls, models: Sequence[Tensors], labels: Sequence[str]) -> "Operands":
        """The operands of a merge.

        Args:
            models: the tensors of each model.
            labels: how messages call them.

        Raises:
            InputError: there are none, or they differ in names, shapes, in what is a floating-point tensor, or in the
                values of what is none; all differences are listed.
        """
        if not models:
            raise InputError("there is nothing to merge: no model was given")
        first, *others = models
        for label, other in zip(labels[1:], others, strict=True):
            _check_names(first, other, labels[0], label)
        problems: list[str] = []
        names: list[str] = []
        kept: list[str] = []
        same: dict[str, str] = {}
        seen: dict[tuple[object, ...], str] = {}
        for name in first:
            tensor = first[name]
            for label, other in zip(labels[1:], others, strict=True):
                problems += _differences(name, tensor, other[name], labels[0], label)
            if not tensor.is_floating_point():
                kept.append(name)
                continue
            # What a lazy mapping has read is gone by now, and its memory may be another tensor's.
            twin = seen.setdefault(_memory_of(tensor), name) if isinstance(first, dict) and tensor.numel() else name
            if twin == name:
                names.append(name)
            else:
                same[name] = twin
        if problems:
            more = [f"and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
            listed = "\n- ".join([*problems[:_MOST_LISTED], *more])
            raise InputError(f"the models cannot be merged; merging needs models of one architecture:\n- {listed}")
        return cls(tuple(models), tuple(names), tuple(kept), same)

    def each(self, name: str) -> Iterator[Tensor]:
        """A weight of one model after another, in float64."""
        for model in self.models:
            yield model[name].double()

    def cast(self, name: str, merged: Tensor) -> Tensor:
        """What was merged, in the dtype of the first model."""
        return merged.to(self.models[0][name].dtype)

    def outcome(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All names with what was merged, in the order of the first model; weights that share memory share it again."""
        first = self.models[0]
        return {name: first[name] if name in self.kept else merged[self.same.get(name, name)] for name in first}


def _check_names(first: Tensors, other: Tensors, first_label: str, label: str) -> None:
    missing, unknown = [name for name in first if name not in other], [name for name in other if name not in first]
    if missing or unknown:
        parts = [f"{label} lacks {join_names(missing, limit=5)}"] if missing else []
        parts += [f"{label} alone has {join_names(unknown, limit=5)}"] if unknown else []
        raise InputError(
            f"{label} and {first_label} do not have the same tensors: {'; '.join(parts)}. Merging needs models of one "
            "architecture, all under the same names"
        )


def _differences(name: str, tensor: Tensor, other: Tensor, first_label: str, label: str) -> list[str]:
    if tensor.shape != other.shape:
        return [f"{name!r} is {list(tensor.shape)} in {first_label} and {list(other.shape)} in {label}"]
    if tensor.is_floating_point() != other.is_floating_point():
        return [f"{name!r} is {tensor.dtype} in {first_label} and {other.dtype} in {label}"]
    if not tensor.is_floating_point() and not torch.equal(tensor, other.to(tensor.dtype)):
        return [f"{name!r} holds {tensor.dtype} and differs between {first_label} and {label}"]
    return []


def _memory_of(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors that are one weight have in common."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
