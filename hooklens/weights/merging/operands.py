"""What is merged: models of one kind, held against each other before any work, and read a piece at a time.

Formulas see `N_PIECE` entries of a weight of each model at once, in float64, whatever the size of the weight. Two names
of one model that are one weight count once.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.errors import InputError, join_names
from hooklens.weights.merging.kinds import MergedTensors, Operand, Outline, open_operand

N_PIECE = 1 << 18
"""Entries of a weight that are merged at once: 2 MiB of float64 for each model."""

_MOST_LISTED = 12


@dataclass(frozen=True)
class Operands:
    """Models whose tensors have the same names and shapes; floating dtypes may differ, and the first model's counts.

    Attributes:
        models: all of one kind; the first is the base, where there is one.
        names: of the weights that are merged, each weight once.
        outlines: of all tensors, the first model's.
        on_read: called with the number of entries each time that some are read.
    """

    models: tuple[Operand, ...]
    names: tuple[str, ...]
    outlines: Mapping[str, Outline]
    on_read: Callable[[int], object] = field(default=lambda n_entries: None)

    @classmethod
    def of(
        cls, given: Sequence[object], labels: Sequence[str], on_read: Callable[[int], object] = lambda n_entries: None
    ) -> "Operands":
        """The operands of a merge.

        Args:
            given: models as a caller gave them, the first one being what others are held against.
            labels: how messages call them.
            on_read: called with the number of entries each time that some are read.

        Raises:
            InputError: they are of several kinds, or differ in their networks, in names, shapes, in what is a
                floating-point tensor, or in the values of what is none; all differences are listed.
        """
        models = [open_operand(one, label) for one, label in zip(given, labels, strict=True)]
        first, *others = models
        for label, other in zip(labels[1:], others, strict=True):
            if type(other) is not type(first):
                raise InputError(
                    f"{labels[0]} is one of {first.noun} and {label} of {other.noun}; give all models of a merge in "
                    "one form"
                )
            _check_names(first, other, labels[0], label)
        outlines, same = first.outlines(), first.same()
        problems: list[str] = []
        for label, other in zip(labels[1:], others, strict=True):
            problems += [f"{what} between {labels[0]} and {label}" for what in first.differences(other)]
            problems += _differing_tensors(first, other, labels[0], label)
        if problems:
            more = [f"and {len(problems) - _MOST_LISTED} more"] if len(problems) > _MOST_LISTED else []
            listed = "\n- ".join([*problems[:_MOST_LISTED], *more])
            raise InputError(f"the models cannot be merged; merging needs models of one architecture:\n- {listed}")
        names = tuple(name for name, one in outlines.items() if one.dtype.is_floating_point and name not in same)
        return cls(tuple(models), names, outlines, on_read)

    @property
    def n_entries(self) -> int:
        """Entries of all weights that are merged, each weight counted once."""
        return sum(self.outlines[name].n_entries for name in self.names)

    def spans(self, name: str) -> Iterator[slice]:
        """The pieces of a weight."""
        return spans_of(self.outlines[name])

    def read(self, model: int, name: str, span: slice) -> Float[Tensor, " entry"]:
        """A piece of a weight of one model, in float64 on the device of the first model's."""
        piece = self.models[model].read(name, span)
        self.on_read(piece.numel())
        place = self.outlines[name].device
        # Apple's devices have no float64.
        return piece.to("cpu" if place.type == "mps" else place).double()

    def merged(
        self, recipe: "Callable[[Operands], Callable[[str], Iterable[Tensor]]]", dtype: torch.dtype | None = None
    ) -> MergedTensors:
        """Merged weights and, as they are, tensors that hold no floating-point numbers.

        Args:
            recipe: gives a function from a weight's name to its merged pieces, one after another. Its work begins when
                the first weight is asked for.
            dtype: of the weights; None: the first model's.
        """
        same, merge_weight = self.models[0].same(), recipe(self)
        for name, outline in self.outlines.items():
            if name in same:
                continue
            if not outline.dtype.is_floating_point:
                yield name, outline, (self.models[0].read(name, span) for span in spans_of(outline))
                continue
            made = Outline(outline.dtype if dtype is None else dtype, outline.shape, outline.device)
            yield name, made, _cast(merge_weight(name), made)


def _cast(pieces: Iterable[Tensor], outline: Outline) -> Iterator[Tensor]:
    return (piece.to(outline.dtype).to(outline.device) for piece in pieces)


def spans_of(outline: Outline) -> Iterator[slice]:
    """The pieces of a tensor, each small."""
    return (slice(start, min(start + N_PIECE, outline.n_entries)) for start in range(0, outline.n_entries, N_PIECE))


def _check_names(first: Operand, other: Operand, first_label: str, label: str) -> None:
    ours, theirs = first.outlines(), other.outlines()
    missing, unknown = [name for name in ours if name not in theirs], [name for name in theirs if name not in ours]
    if missing or unknown:
        parts = [f"{label} lacks {join_names(missing, limit=5)}"] if missing else []
        parts += [f"{label} alone has {join_names(unknown, limit=5)}"] if unknown else []
        raise InputError(
            f"{label} and {first_label} do not have the same tensors: {'; '.join(parts)}. Merging needs models of one "
            "architecture, all under the same names"
        )


def _differing_tensors(first: Operand, other: Operand, first_label: str, label: str) -> list[str]:
    """What stands against a merge in the tensors of two models with the same names."""
    problems = []
    theirs = other.outlines()
    for name, ours in first.outlines().items():
        found = theirs[name]
        if ours.shape != found.shape:
            problems.append(f"{name!r} is {list(ours.shape)} in {first_label} and {list(found.shape)} in {label}")
        elif ours.dtype.is_floating_point != found.dtype.is_floating_point:
            problems.append(f"{name!r} is {ours.dtype} in {first_label} and {found.dtype} in {label}")
        elif not ours.dtype.is_floating_point and not _are_equal((first, name), (other, name)):
            problems.append(f"{name!r} holds {ours.dtype} and differs between {first_label} and {label}")
    for name, twin in first.same().items():
        if not problems and other.same().get(name) != twin and not _are_one(other, name, twin):
            problems.append(f"{name!r} and {twin!r} are one weight in {first_label} and two in {label}")
    return problems


def _are_one(model: Operand, name: str, twin: str) -> bool:
    """Whether two tensors of a model hold the same numbers, or one those of the other's transpose."""
    outline, other = model.outlines()[name], model.outlines()[twin]
    if outline.shape == other.shape:
        return _are_equal((model, name), (model, twin))
    whole = slice(0, other.n_entries)
    return torch.equal(model.read(twin, whole).view(other.shape).T.flatten(), model.read(name, whole))


def _are_equal(one: tuple[Operand, str], other: tuple[Operand, str]) -> bool:
    """Whether two tensors hold the same numbers, of their dtypes the first one's."""
    (model, name), (second, second_name) = one, other
    outline = model.outlines()[name]
    return all(
        torch.equal(piece := model.read(name, span), second.read(second_name, span).to(piece))
        for span in spans_of(outline)
    )
