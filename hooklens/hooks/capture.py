"""Capturing activations: a listener that keeps what passes."""

import weakref

import torch
from torch import Tensor

from hooklens.axes import find_site
from hooklens.errors import HookLensError, InputError
from hooklens.hooks.point import HookPoint
from hooklens.hooks.pos_slice import PosSlice, read_pos_slice, resolve_positions


class Capture:
    """Keeps the tensors that pass the hook points it is attached to, under their names.

    Nothing is copied unless it has to be (another device or dtype, or a slice of positions), and a tensor
    that passes several points is kept once: the stream leaving a block is the stream entering the next.

    Args:
        device: where to keep the tensors; None: where they are.
        dtype: floating dtype to keep them in; None: their own.
        pos_slice: positions (columns) to keep, of every axis `pos` or `query`. The axis stays, also for an int.

    Attributes:
        tensors: what was captured, by hook name, in the order of firing.

    Raises:
        HookLensError: `dtype` is not a floating one.
        InputError: `pos_slice` is of another kind.
    """

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos_slice: PosSlice = None,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise HookLensError(f"activations cannot be kept as {dtype}; expected a floating dtype")
        self.tensors: dict[str, Tensor] = {}
        self._device = torch.device(device) if device is not None else None
        self._dtype = dtype
        self._pos_slice = read_pos_slice(pos_slice)
        self._as_is = device is None and dtype is None and pos_slice is None
        self._kept: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def __call__(self, tensor: Tensor, point: HookPoint) -> None:
        """Keep what passes `point`."""
        if self._as_is and not tensor.requires_grad:
            self.tensors[point.name or ""] = tensor
            return
        self.add(point.name or "", tensor)

    def add(self, name: str, tensor: Tensor, *, like: str | None = None) -> None:
        """Keep a tensor under a name.

        Args:
            name: the key in `tensors`.
            tensor: what to keep.
            like: the hook point whose axes the tensor has, where `name` is not one itself.
        """
        if self._as_is and not tensor.requires_grad:
            self.tensors[name] = tensor
            return
        # A weak reference: a slice or a copy on another device must not keep the original alive.
        original, kept = self._kept.get(id(tensor), (None, None))
        if kept is None or original is None or original() is not tensor:
            kept = self._prepare(like or name, tensor)
            self._kept[id(tensor)] = (weakref.ref(tensor), kept)
        self.tensors[name] = kept

    def _prepare(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if self._pos_slice is not None:
            tensor = self._slice_positions(name, tensor)
        return tensor.to(device=self._device, dtype=self._dtype)

    def _slice_positions(self, name: str, tensor: Tensor) -> Tensor:
        site = find_site(name)
        if site is None:
            raise HookLensError(f"pos_slice: the axes of {name!r} are not known, so its positions cannot be sliced")
        axis = next((site.axes.index(word) for word in ("pos", "query") if word in site.axes), None)
        if axis is None:
            return tensor
        positions = choose_columns(self._pos_slice, tensor.shape[axis], where=f"pass {name!r}")
        # A copy, also of neighbouring positions: a view would keep those left out alive.
        return tensor.index_select(axis, torch.tensor(positions, device=tensor.device))


def choose_columns(pos_slice: PosSlice, n_columns: int, *, where: str) -> list[int]:
    """The columns that a capture keeps, counted from 0.

    Args:
        pos_slice: which; None: all.
        n_columns: how many there are.
        where: ends the sentence "5 positions ...", for messages.

    Raises:
        InputError: `pos_slice` is of another kind, out of range, or keeps nothing.
    """
    positions = read_pos_slice(pos_slice)
    if positions is None:
        return list(range(n_columns))
    columns = resolve_positions(positions, n_columns, where=where)
    if not columns:
        raise InputError(f"pos_slice={positions!r} keeps nothing: {n_columns} positions {where}")
    return columns
