"""Capturing activations: a watcher that keeps what passes."""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

from hooklens.errors import HookLensError, InputError
from hooklens.hooks.call import Call, Hook, Listeners, Listening
from hooklens.hooks.choice import Choice, Index, read_choice, resolve_choice
from hooklens.hooks.point import HookPoint

GRAD = "_grad"
"""What stands after an activation's name in the name of its gradient."""


class Capture:
    """Keeps the tensors that pass the hook points it listens at, under their names.

    Nothing is copied unless it has to be (another device or dtype, or a slice of positions), and a tensor
    that passes several points is kept once: the stream leaving a block is the stream entering the next.

    Args:
        points: where to listen, by the names to keep the tensors under.
        device, dtype, incl_bwd: as in `HookedModule.run_with_cache`; whoever listens runs the backward pass.
        pos_slice: positions (columns) to keep, of every axis `pos` or `query`. The axis stays, also for an int.

    Attributes:
        tensors: what was captured, by hook name, in the order of firing.

    Raises:
        HookLensError: `dtype` is not a floating one.
        InputError: `pos_slice` is of another kind.
    """

    def __init__(
        self,
        points: dict[str, HookPoint],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos_slice: Choice = None,
        incl_bwd: bool = False,
    ) -> None:
        if dtype is not None and not dtype.is_floating_point:
            raise HookLensError(f"activations cannot be kept as {dtype}; expected a floating dtype")
        self.tensors: dict[str, Tensor] = {}
        self._names = {point: name for name, point in points.items()}
        self._incl_bwd = incl_bwd
        self._device = torch.device(device) if device is not None else None
        self._dtype = dtype
        self._pos_slice = read_choice(pos_slice, what="pos_slice", refuse_tuple=True)
        self._as_is = device is None and dtype is None and self._pos_slice is None
        self._kept: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}
        self._columns: dict[str, list[int]] = {}

    @property
    def listeners(self) -> Listeners:
        """The capture at each of its points."""
        if not self._incl_bwd:
            return dict.fromkeys(self._names, Listening(watchers=[self]))
        # A gradient hook makes a tensor that gradients reach, and the capture keeps that one.
        return {
            point: Listening(
                gradient_hooks=[Hook(self._keep_gradient, point.called(name), form="point")], watchers=[self]
            )
            for point, name in self._names.items()
        }

    def keep(self, tensor: Tensor, point: HookPoint, call: Call) -> None:
        """Keep what passes a point."""
        name = self._names[point]
        if self._as_is and not tensor.requires_grad:
            self.tensors[name] = tensor
        elif torch.compiler.is_compiling():
            self.tensors[name] = self._prepare(name, tensor, point, call)
        else:
            self.tensors[name] = self._prepare_once(name, tensor, point, call)

    def fill_in_gradients(self) -> None:
        """Give 0 to activations that a backward pass did not reach: nothing that it started from depends on them."""
        for name in [name for name in self.tensors if not name.endswith(GRAD)]:
            kept = self.tensors[name]
            if kept.is_floating_point():
                self.tensors.setdefault(name + GRAD, torch.zeros_like(kept))

    def _keep_gradient(self, gradient: Tensor, hook: HookPoint) -> None:
        self.tensors[f"{hook.name}{GRAD}"] = self._prepare(str(hook.name), gradient, hook, None)

    def _prepare_once(self, name: str, tensor: Tensor, point: HookPoint, call: Call) -> Tensor:
        # A weak reference: a slice or a copy on another device must not keep the original alive.
        original, kept = self._kept.get(id(tensor), (None, None))
        if kept is None or original is None or original() is not tensor:
            kept = self._prepare(name, tensor, point, call)
            self._kept[id(tensor)] = (weakref.ref(tensor), kept)
        return kept

    def _prepare(self, name: str, tensor: Tensor, point: HookPoint, call: Call | None) -> Tensor:
        tensor = tensor.detach()
        if self._pos_slice is not None:
            tensor = self._slice_positions(name, tensor, point, call)
        # Numbers that name something stay whole.
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else None)

    def _slice_positions(self, name: str, tensor: Tensor, point: HookPoint, call: Call | None) -> Tensor:
        if point.site is None:
            raise HookLensError(f"pos_slice: the axes of {name!r} are not known, so its positions cannot be sliced")
        axis = point.site.position_axis
        if axis is None:
            return tensor
        columns = self._columns.get(name) if call is None else None
        if columns is None:
            columns = self._choose_columns(name, tensor.shape[axis], call)
            self._columns[name] = columns
        # A copy, also of neighbouring positions: a view would keep those left out alive.
        return tensor.index_select(axis, torch.tensor(columns, device=tensor.device))

    def _choose_columns(self, name: str, n_columns: int, call: Call | None) -> list[int]:
        """The places on a point's position axis that hold the wanted columns of the call."""
        tokens = None if call is None else call.tokens
        held = None if tokens is None else tokens.columns
        if held is None:
            return _resolve(self._pos_slice, n_columns, where=f"positions at {name!r}")
        wanted = _resolve(self._pos_slice, tokens.n_run, where="positions run in this call")  # type: ignore[union-attr]
        return columns_among(wanted, held, name)


def choose_columns(pos_slice: Choice, n_columns: int, *, where: str) -> list[int]:
    """The columns that a capture keeps, counted from 0.

    Args:
        pos_slice: which; None: all.
        n_columns: how many there are.
        where: what they are, for messages: `"positions run in this call"`.

    Raises:
        InputError: `pos_slice` is of another kind, out of range, or keeps nothing.
    """
    return _resolve(read_choice(pos_slice, what="pos_slice", refuse_tuple=True), n_columns, where=where)


def _resolve(index: Index, n_columns: int, *, where: str) -> list[int]:
    columns = resolve_choice(index, n_columns, what="pos_slice", noun=where)
    if not columns:
        raise InputError(f"pos_slice={index!r} keeps nothing: there are {n_columns} {where}")
    return columns


def columns_among(wanted: Sequence[int], held: Sequence[int] | Tensor, name: str) -> list[int]:
    """The places, on an axis that holds some columns of a call only (those of `logits_at`), of the ones to keep.

    Raises:
        InputError: none of them, or other columns in each row.
    """
    if isinstance(held, Tensor):
        raise InputError(
            f"pos_slice counts columns of the call, and with padding logits_at computes other ones in each row at "
            f"{name!r}; leave out pos_slice, logits_at, or this point"
        )
    places = [held.index(column) for column in wanted if column in held]
    if not places:
        raise InputError(
            f"pos_slice keeps positions {list(wanted)}, logits_at computes {list(held)}: nothing to keep at {name!r}; "
            "leave this point out, or let the two meet"
        )
    return places
