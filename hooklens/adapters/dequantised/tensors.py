"""The tensors of a quantised checkpoint under the names and in the shapes of the plain one.

A quantised weight is several tensors on disk: its entries, as small numbers, and the scales that they are multiplied
by. Which, and how they make a weight, is what a `QuantFormat` says. One weight at a time is in memory.
"""

import math
from collections.abc import Collection, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from hooklens.adapters.conversion import TensorSource
from hooklens.adapters.files.disk import TensorHeader
from hooklens.adapters.kept import Kept, Rows
from hooklens.errors import CheckpointError, join_names

# Entries of a tensor that is worth giving its memory back.
_LARGE = 2**20


class Parts:
    """The tensors on disk that make one weight, by what they are in it.

    Args:
        source: where they are.
        names: their names on disk, by role.
    """

    def __init__(self, source: TensorSource, names: Mapping[str, str]) -> None:
        self._source, self._names = source, names

    def __contains__(self, role: str) -> bool:
        return role in self._names

    def shape(self, role: str) -> tuple[int, ...]:
        """The shape of one."""
        return self._source.header(self._names[role]).shape

    def dtype(self, role: str) -> str:
        """The name of the dtype of one."""
        return self._source.header(self._names[role]).dtype

    def read(self, role: str) -> Tensor:
        """One of them."""
        # A mapping of its own costs another look at the file's header, which memory for scales is not worth.
        return self._source.read(self._names[role], apart=math.prod(self.shape(role)) >= _LARGE)


@runtime_checkable
class QuantFormat(Protocol):
    """How one way to quantise stores a weight, and what it is."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def markers(self) -> Collection[str]:
        """Endings of names on disk; what stands before is a weight's name without `plain`."""
        ...

    @property
    def plain(self) -> str:
        """The ending of a weight's name in a plain checkpoint."""
        ...

    @property
    def parts(self) -> Mapping[str, str]:
        """Endings of the names of the tensors that every weight is made of, by role."""
        ...

    @property
    def extras(self) -> Mapping[str, str]:
        """The same of those that some weights have."""
        ...

    @property
    def ignored(self) -> Collection[str]:
        """Endings of the names of tensors that are no part of any weight: scales of activations and of caches."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Of dequantised weights; the weights are exact in it, or as exact as float32 makes them."""
        ...

    @property
    def is_turned(self) -> bool:
        """Whether the plain checkpoint always has inputs before outputs."""
        ...

    @property
    def pads_biases(self) -> bool:
        """Whether maps without bias are given one of zeros."""
        ...

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """The shape of the weight: outputs and inputs, before them experts where it holds those of all.

        Raises:
            CheckpointError: its tensors do not fit together; the text begins with what is wrong.
        """
        ...

    def dequantise(self, parts: Parts) -> Tensor:
        """The weight, in that shape."""
        ...

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Why rows of a weight cannot be taken as they are stored; None where they can."""
        ...

    def keep(self, parts: Parts, rows: Rows) -> Kept:
        """Rows of a weight as they are stored, of every expert where it holds those of all."""
        ...


class DequantisedTensors:
    """A quantised checkpoint's tensors as those of the plain one.

    Args:
        source: the tensors on disk.
        scheme: how weights are quantised.
        where: what to call the place in texts of errors.
        conv1d: linear maps of the plain checkpoint lie as `[in, out]`. Quantised, they are stored as any others.
        head: name of the unembedding, which lies as `[out, in]` all the same.

    Raises:
        CheckpointError: no weight is quantised, tensors are missing, or they do not fit together; all are listed.
    """

    def __init__(
        self, source: TensorSource, scheme: QuantFormat, *, where: str, conv1d: bool = False, head: str = ""
    ) -> None:
        self._source, self._scheme = source, scheme
        self._turned = conv1d
        self._head = head
        stored = source.names()
        bases = {name.removesuffix(marker) for marker in scheme.markers for name in stored if name.endswith(marker)}
        if not bases:
            raise CheckpointError(
                f"{where}: config.json says that weights are quantised ({scheme.name}), and none is: no name ends with "
                f"{' or '.join(map(repr, scheme.markers))}. Take quantization_config out of config.json if the weights "
                "are plain, or download them again"
            )
        self._packed: dict[str, Parts] = {}
        self._headers: dict[str, TensorHeader] = {}
        taken: set[str] = set()
        problems = []
        for base in sorted(bases):
            needed = {role: base + ending for role, ending in scheme.parts.items()}
            missing = [name for name in needed.values() if name not in stored]
            if missing:
                problems.append(f"missing tensors: {join_names(missing)}")
                continue
            extras = {role: base + ending for role, ending in scheme.extras.items() if base + ending in stored}
            taken.update(needed.values(), extras.values())
            name = base + scheme.plain
            self._packed[name] = Parts(source, needed | extras)
            try:
                shape = scheme.shape(self._packed[name])
            except CheckpointError as error:
                problems.append(f"{name!r}: {error}")
            else:
                dtype = str(scheme.dtype).removeprefix("torch.")
                self._headers[name] = TensorHeader(dtype, _turn(shape) if self.is_turned(name) else shape)
        if problems:
            left_out = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
            raise CheckpointError(
                f"{where}: weights that are quantised ({scheme.name}) cannot be read: "
                f"{'; '.join(problems[:20])}{left_out}. Check that config.json and the weights belong together and "
                "that the download is whole"
            )
        ignored = tuple(scheme.ignored)
        self._plain = [name for name in stored if name not in taken and not (ignored and name.endswith(ignored))]

    def names(self) -> Collection[str]:
        """Names of all tensors of the plain checkpoint."""
        return [*self._plain, *self._packed]

    def header(self, name: str) -> TensorHeader:
        """The dtype and shape of a tensor."""
        return self._headers[name] if name in self._packed else self._source.header(name)

    def read(self, name: str, *, apart: bool = False) -> Tensor:
        """The tensor; a quantised one is dequantised anew each time."""
        if name not in self._packed:
            return self._source.read(name, apart=apart)
        weight = self._scheme.dequantise(self._packed[name])
        return weight.mT if self.is_turned(name) else weight

    @property
    def method(self) -> str:
        """The name of the way in which weights are quantised."""
        return self._scheme.name

    def is_quantised(self, name: str) -> bool:
        """Whether a tensor of the plain checkpoint is quantised."""
        return name in self._packed

    def shape_of_map(self, name: str) -> tuple[int, ...]:
        """The shape of a quantised tensor as it is stored."""
        shape = self._headers[name].shape
        return _turn(shape) if self.is_turned(name) else shape

    def why_not_kept(self, name: str, rows: Rows) -> str | None:
        """Why rows of a quantised tensor cannot be taken as they are stored; None where they can."""
        return self._scheme.why_not_kept(self._packed[name], rows)

    def keep(self, name: str, rows: Rows) -> Kept:
        """Rows of a quantised tensor as they are stored, of every expert where it holds those of all."""
        return self._scheme.keep(self._packed[name], rows)

    def is_padding(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros that a map was given when it was quantised."""
        if not (self._scheme.pads_biases and name.endswith(".bias")):
            return False
        of_packed = name.removesuffix(".bias") + self._scheme.plain in self._packed
        return of_packed and not self._source.read(name, apart=True).any()

    def is_turned(self, name: str) -> bool:
        """Whether a quantised tensor is stored as `[out, in]` and is `[in, out]` in the plain checkpoint."""
        return self._scheme.is_turned or (self._turned and name != self._head)


def _turn(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])
