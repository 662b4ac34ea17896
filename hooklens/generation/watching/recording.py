"""Capturing while generating: the steps' activations, put together as one run of the whole sequences.

What comes out has the shapes of a forward over prompts and new tokens, padded on the right, all but the last
new token of each row (which no forward has run). Columns of padding hold 0, or -inf among attention scores.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hooklens.axes import HookSite, find_site
from hooklens.errors import HookNameError, join_names
from hooklens.generation.model import GeneratingModel
from hooklens.hooks.call import Call, Listeners, Listening
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint


@dataclass(frozen=True, kw_only=True)
class _Step:
    """What one call captured.

    Attributes:
        rows: rows of the result that the tensors hold; None: the prompts.
        first_column: where the call's tokens begin, counted with the prompts' padding.
        tensors: by hook name.
    """

    rows: Tensor | None
    first_column: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """Where the tokens of the result's rows stand.

    Attributes:
        padding: `[rows]`, columns of padding before each row's prompt.
        n_run: `[rows]`, tokens of each row that were run.
        n_past: columns in the key-value cache that was given.
        n_samples: rows for each prompt.
    """

    padding: Tensor
    n_run: Tensor
    n_past: int
    n_samples: int


class Recorder:
    """Listens at hook points and keeps what passes, step by step.

    Args:
        model: finds hook points.
        names_filter: which; None: none.

    Raises:
        HookNameError: the filter selects nothing, or points whose axes are not known.
    """

    def __init__(self, model: GeneratingModel, names_filter: NamesFilter) -> None:
        self._points: dict[str, HookPoint] = {} if names_filter is None else model.select_hook_points(names_filter)
        unknown = [name for name, point in self._points.items() if point.site is None]
        if unknown:
            raise HookNameError(
                f"generate: the axes of {join_names(unknown)} are not known, so what passes there at different steps "
                "cannot be put together; use a hook that collects it"
            )
        self._passing: dict[str, Tensor] = {}
        self._steps: list[_Step] = []

    def __bool__(self) -> bool:
        return bool(self._points)

    @property
    def listeners(self) -> Listeners:
        """The recorder at each of its points."""
        return dict.fromkeys(self._points.values(), Listening(watchers=[self]))

    def keep(self, tensor: Tensor, point: HookPoint, call: Call) -> None:
        """Keep what passes a point, until the step ends."""
        self._passing[point.name or ""] = tensor

    def end_step(self, *, n_new: int, first_column: int, rows: Tensor | None, places: Tensor | None) -> None:
        """File what the call just made has captured.

        Args:
            n_new: how many of the call's last columns to keep.
            first_column: the column of the first of them, counted with the prompts' padding.
            rows: rows of the result; None: the prompts.
            places: the rows of the call that hold them; None: all, in order.
        """
        kept = {}
        for name, tensor in self._passing.items():
            axis = _position_axis(_site(name))
            surplus = tensor.shape[axis] - n_new
            if surplus:
                tensor = tensor.narrow(axis, surplus, n_new).clone()  # noqa: PLW2901
            kept[name] = tensor if places is None else tensor[places]
        self._passing = {}
        self._steps.append(_Step(rows=rows, first_column=first_column, tensors=kept))

    def assemble(self, layout: RowLayout) -> dict[str, Tensor]:
        """The captured activations as those of one run."""
        names = dict.fromkeys(name for step in self._steps for name in step.tensors)
        return {name: self._assemble_point(name, layout) for name in names}

    def _assemble_point(self, name: str, layout: RowLayout) -> Tensor:
        site = _site(name)
        fill = -torch.inf if name.endswith("hook_attn_scores") else 0.0
        axis = _position_axis(site)
        key_axis = site.axes.index("key") if "key" in site.axes else None
        steps = [step for step in self._steps if name in step.tensors]
        last = steps[-1]
        n_columns = last.first_column + last.tensors[name].shape[axis]
        shape = list(last.tensors[name].shape)
        shape[0], shape[axis] = len(layout.n_run), n_columns
        if key_axis is not None:
            shape[key_axis] = layout.n_past + n_columns
        joined = last.tensors[name].new_full(shape, fill)
        for step in steps:
            _place_step(joined, step, name, axis, key_axis, layout.n_samples)
        joined = _move_to_front(joined, axis, layout, n_past=0, fill=fill)
        if key_axis is not None:
            joined = _move_to_front(joined, key_axis, layout, n_past=layout.n_past, fill=fill)
        return joined


def _place_step(joined: Tensor, step: _Step, name: str, axis: int, key_axis: int | None, n_samples: int) -> None:
    """Write what a step captured to its rows and columns."""
    tensor = step.tensors[name]
    if step.rows is None and n_samples > 1:
        tensor = tensor.repeat_interleave(n_samples, 0)
    target = joined if key_axis is None else joined.narrow(key_axis, 0, tensor.shape[key_axis])
    target = target.narrow(axis, step.first_column, tensor.shape[axis])
    if step.rows is None:
        target.copy_(tensor)
    else:
        target[step.rows] = tensor


def _move_to_front(tensor: Tensor, axis: int, layout: RowLayout, *, n_past: int, fill: float) -> Tensor:
    """Turn padding on the left into padding on the right, behind `n_past` columns that stay."""
    n_columns = n_past + int(layout.n_run.max())
    column = torch.arange(n_columns, device=tensor.device)
    if bool((layout.padding > 0).any()):
        source = column + torch.where(column < n_past, 0, layout.padding[:, None])
        shape = [1] * tensor.ndim
        shape[0], shape[axis] = source.shape
        tensor = tensor.take_along_dim(source.clamp(max=tensor.shape[axis] - 1).view(shape), axis)
    else:
        tensor = tensor.narrow(axis, 0, n_columns)
    is_padding = column >= n_past + layout.n_run[:, None]
    if not bool(is_padding.any()):
        return tensor
    shape = [1] * tensor.ndim
    shape[0], shape[axis] = is_padding.shape
    return tensor.masked_fill(is_padding.view(shape), fill)


def _site(name: str) -> HookSite:
    site = find_site(name)
    assert site is not None
    return site


def _position_axis(site: HookSite) -> int:
    return next(site.axes.index(word) for word in ("pos", "query") if word in site.axes)
