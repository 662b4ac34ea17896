"""Weights as the matrix multiplication wants them, without making a view for every call."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.hooks import HookedModule
from hooklens.weights.layout import stored_view


class StoredWeights(HookedModule):
    """A module that multiplies by its parameters' stored `[out, in]` matrices (see `hooklens.weights.layout`).

    A view takes a microsecond or two, and a block needs ten of them, which decoding token by token would feel.
    So views that no gradient flows through are kept as long as the parameters stay where they are in memory.
    They share the parameters' memory: a change of the values shows in them.
    """

    _view_names: tuple[str, ...] = ()

    def stored_weights(self) -> list[Any]:
        """Tensors for the parameters in `_view_names`, biases flat; None for those the module does not have."""
        parameters = [getattr(self, name) for name in self._view_names]
        if torch.is_grad_enabled():
            return self._make_views(parameters)
        try:
            places = [None if parameter is None else parameter.data_ptr() for parameter in parameters]
        except RuntimeError:
            # Transformed tensors (torch.func) lie nowhere in memory.
            return self._make_views(parameters)
        kept: tuple[list[int | None], list[Tensor | None]] | None = self.__dict__.get("_kept_views")
        if kept is not None and kept[0] == places:
            return kept[1]
        with torch.inference_mode(mode=False), torch.no_grad():
            views = self._make_views([None if weight is None else weight.detach() for weight in parameters])
        # A weight in another layout had to be copied, and a copy would miss changes of its values.
        if [None if view is None else view.data_ptr() for view in views] == places:
            self.__dict__["_kept_views"] = places, views
        return views

    def _make_views(self, parameters: list[Tensor | None]) -> list[Tensor | None]:
        return [
            None if weight is None else stored_view(name, weight) if name.startswith("W_") else weight.flatten()
            for name, weight in zip(self._view_names, parameters, strict=True)
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001, FBT002
        # Views would keep the memory alive that the parameters leave.
        self.__dict__.pop("_kept_views", None)
        applied: nn.Module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return applied

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle, without the views."""
        return {name: value for name, value in super().__getstate__().items() if name != "_kept_views"}
