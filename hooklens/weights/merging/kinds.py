"""The kinds of models that are merged, and what of a kind comes back: an open table.

A kind is a class with the methods of `Operand`, registered for a type with `open_operand.register`. State dicts are
here; checkpoint folders and hooked models register in rows above.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.arguments import refusal
from hooklens.errors import InputError, join_names
from hooklens.optional import import_package
from hooklens.weights.late_kinds import LATE_KINDS
from hooklens.weights.quantised import is_quantised_tensor

Tensors = Mapping[str, Tensor]
"""A model's tensors by name; may be lazy."""

_EXPECTED = "tensors by name, a checkpoint folder, or a HookedCausalLM"


@dataclass(frozen=True)
class Outline:
    """What is known of a tensor before its entries are read."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (a device is immutable)

    @property
    def n_entries(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Target:
    """What a merge is to give.

    Attributes:
        out: the folder to write, of a merge of folders.
        dtype: of the floating-point tensors; None: of each that of the first model, the base where there is one.
        max_shard_size: files of a folder are split at this size.
    """

    out: Path | None = None
    dtype: torch.dtype | None = None
    max_shard_size: int | str = "5GB"


MergedTensors = Iterable[tuple[str, Outline, Iterator[Tensor]]]
"""Names, outlines and the pieces of merged tensors, flat and one after another, to be taken in this order."""


@runtime_checkable
class Operand(Protocol):
    """One model of a merge."""

    noun: str
    """What its kind is called in messages, many of it."""

    def outlines(self) -> Mapping[str, Outline]:
        """All of its tensors."""
        ...

    def same(self) -> Mapping[str, str]:
        """For a name under which a weight, or its transpose, stands once more: the name under which it counts."""
        ...

    def read(self, name: str, span: slice) -> Tensor:
        """Some entries of a tensor, flat, in the order of rows."""
        ...

    def differences(self, other: Any) -> list[str]:
        """What of the networks differs, beside tensors, from those of another operand of the kind."""
        ...

    def check_target(self, target: Target) -> None:
        """Refuse what does not go with the kind, before any work."""

    def build(self, merged: MergedTensors, target: Target) -> Any:
        """A model of the kind, like this one, with merged tensors."""
        ...

    def transformers_state(self) -> dict[str, Tensor]:
        """The state dict of the transformers model: all names, tied ones sharing memory, in the module's order."""
        ...

    def build_transformers(self, state: dict[str, Tensor], target: Target) -> Any:
        """A model of the kind, like this one, with the state dict of a transformers model."""
        ...


@singledispatch
def open_operand(given: object, label: str) -> Operand:
    """One model of a merge, of the kind that its type is registered for.

    Args:
        given: what a caller gave.
        label: what to call it in messages.

    Raises:
        HookLensError: no such kind, or a model that cannot be merged.
    """
    raise refusal(given, label, _EXPECTED)


def check_kind(given: object, *, what: str, error: type[Exception] = InputError) -> Any:
    """A model of any kind that can be merged.

    Raises:
        HookLensError: anything else.
    """
    if not isinstance(given, Mapping):
        for module in LATE_KINDS:
            import_package(module)
    if open_operand.dispatch(type(given)) is open_operand.dispatch(object):
        if isinstance(given, torch.nn.Module):
            raise refusal(given, what, f"{_EXPECTED}; of a transformers model, HookedCausalLM.from_hf(model)")
        raise refusal(given, what, _EXPECTED)
    return given


class StateDict:
    """The tensors of a model by name; a lazy mapping is asked for one at a time.

    Raises:
        InputError: values that are no tensors, hold no entries one by one, or are quantised; all are listed.
    """

    noun = "state dicts"

    def __init__(self, given: Mapping[str, Tensor], label: str) -> None:
        self._tensors: Tensors = given
        self._held: tuple[str, Tensor] | None = None
        self._outlines: dict[str, Outline] = {}
        self._same: dict[str, str] = {}
        wrong, twins = [], _Twins(given, transposed=True)
        for name, tensor in given.items():
            if not isinstance(tensor, Tensor) or is_quantised_tensor(tensor) or _has_no_entries(tensor):
                wrong.append(name)
                continue
            self._outlines[name] = Outline(tensor.dtype, tuple(tensor.shape), tensor.device)
            if (twin := twins.find(name, tensor)) is not None:
                self._same[name] = twin
        if wrong:
            raise InputError(
                f"{label} holds what is no plain tensor (none at all, quantised, or without values) under "
                f"{join_names(wrong, limit=5)}; expected plain tensors by name"
            )
        if processed := getattr(given, "transforms", ()):
            raise InputError(
                f"{label}: its weights have been processed ({', '.join(processed)}), each model's in its own way, so "
                "that merging them means nothing"
            )

    def outlines(self) -> Mapping[str, Outline]:
        """All tensors, in the order of the mapping."""
        return self._outlines

    def same(self) -> Mapping[str, str]:
        """Names of tensors that share their memory with an earlier one, or with its transpose."""
        return self._same

    def read(self, name: str, span: slice) -> Tensor:
        """Some entries; the tensor stays at hand until another one is asked for."""
        if self._held is None or self._held[0] != name:
            self._held = None
            self._held = (name, self._tensors[name].detach().reshape(-1))
        return self._held[1][span]

    def differences(self, other: Any) -> list[str]:
        """None: there are only tensors."""
        return []

    def check_target(self, target: Target) -> None:
        """Refuse a folder.

        Raises:
            InputError: one was given.
        """
        if target.out is not None:
            raise InputError(
                f"out={str(target.out)!r} goes with folders, and state dicts were given: a state dict comes back"
            )

    def build(self, merged: MergedTensors, target: Target) -> dict[str, Tensor]:
        """A state dict of the same names in the same order; those that share memory share it again."""
        made = {name: collect(outline, pieces) for name, outline, pieces in merged}
        return {name: self._as_shaped(made[self._same.get(name, name)], name) for name in self._outlines}

    def _as_shaped(self, merged: Tensor, name: str) -> Tensor:
        return merged if tuple(merged.shape) == self._outlines[name].shape else merged.T

    def transformers_state(self) -> dict[str, Tensor]:
        """The tensors themselves."""
        return {name: tensor.detach() for name, tensor in self._tensors.items()}

    def build_transformers(self, state: dict[str, Tensor], target: Target) -> dict[str, Tensor]:
        """The tensors themselves."""
        return state


open_operand.register(Mapping, StateDict)


def collect(outline: Outline, pieces: Iterable[Tensor]) -> Tensor:
    """A tensor put together from its pieces."""
    made = torch.empty(outline.shape, dtype=outline.dtype, device=outline.device)
    flat, start = made.view(-1), 0
    for piece in pieces:
        flat[start : start + piece.numel()] = piece
        start += piece.numel()
    return made


def _has_no_entries(tensor: Tensor) -> bool:
    return tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized


def shared_names(state: Tensors) -> dict[str, str]:
    """For names of tensors that share their memory with an earlier one: the name of that one."""
    twins = _Twins(state)
    found = {name: twins.find(name, tensor) for name, tensor in state.items()}
    return {name: twin for name, twin in found.items() if twin is not None}


class _Twins:
    """Finds tensors that share their memory with an earlier one of a mapping.

    Args:
        state: tensors by name.
        transposed: also where one is the transpose of the other, as `W_U` of a tied `W_E`; square ones are taken for
            two.
    """

    def __init__(self, state: Tensors, *, transposed: bool = False) -> None:
        self._state, self._transposed = state, transposed
        self._seen: dict[tuple[object, ...], str] = {}

    def find(self, name: str, tensor: Tensor) -> str | None:
        """The earlier tensor's name; None if there is none."""
        if not (tensor.numel() and tensor.is_floating_point()):
            return None
        memory = self._memory_of(tensor)
        twin = self._seen.setdefault(memory, name)
        # What a lazy mapping has read may be gone, and its memory this tensor's; read anew it lies elsewhere.
        return twin if twin != name and self._memory_of(self._state[twin]) == memory else None

    def _memory_of(self, tensor: Tensor) -> tuple[object, ...]:
        is_wide = self._transposed and tensor.ndim == 2 and tensor.shape[0] < tensor.shape[1]
        return _memory_of(tensor.T if is_wide else tensor)


def _memory_of(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors that are one weight have in common."""
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride()
