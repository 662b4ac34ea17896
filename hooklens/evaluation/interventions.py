"""What acts on a model in a run besides its weights, as values that another run can be compared with.

Edits are values and are compared by what they hold. What a function does cannot be compared: neither that of a hook,
nor that of `Custom`, nor that of an edit of a class of one's own.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import join_names
from hooklens.evaluation.fingerprint import hash_values, tensor_fingerprint
from hooklens.hooks import edits as edit_kinds
from hooklens.hooks.call import Hook, thread_listeners
from hooklens.hooks.edits import Edit


@dataclass(frozen=True, kw_only=True)
class Interventions:
    """What acts on a model.

    Attributes:
        fingerprint: a hash of the edits, in their order, and where they act; `"none"` where nothing acts.
        functions: where functions act, in words; what they do is not in the hash.
    """

    fingerprint: str
    functions: tuple[str, ...]


def find_interventions(model: HookedCausalLM, edits: Sequence[Edit]) -> Interventions:
    """What acts in calls of the model with `edits`: those, and what is attached to it or to the thread.

    Captures only look, and are left out.

    Raises:
        HookNameError: an edit names no hook point.
    """
    values: list[Any] = []
    functions: list[str] = []
    for name, hook in _find_attached(model):
        _describe(hook.source, [name], values, functions)
    for edit in edits:
        _describe(edit, list(model.find_edit_points(edit)), values, functions)
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            functions.append(f"a hook of torch at {name or 'the model'}")
    return Interventions(
        fingerprint=hash_values(values) if values else "none",
        functions=tuple(dict.fromkeys(functions)),
    )


def _find_attached(model: HookedCausalLM) -> Iterable[tuple[str, Hook]]:
    """Hooks of the model's points, then of the thread's `with` blocks, as they run at each point."""
    listeners = thread_listeners()
    for name, point in model.hook_points().items():
        for listening in (point.own, listeners.get(point)):
            if listening is not None:
                yield from ((name, hook) for hook in (*listening.hooks, *listening.gradient_hooks))


def _describe(source: object, names: list[str], values: list[Any], functions: list[str]) -> None:
    """Adds an edit's values, or the words that a function acts."""
    places = join_names(names, limit=3)
    if not isinstance(source, Edit):
        functions.append(f"a hook at {places}")
        return
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source) if field.name != "name"}
    for name in _CHOICES:
        chosen = fields[name]
        fields[name] = chosen.tolist() if isinstance(chosen, Tensor) and not chosen.is_meta else chosen
    described = {name: _as_json(value) for name, value in fields.items()}
    is_own = type(source).__module__ != edit_kinds.__name__
    if is_own or any(value is _FUNCTION for value in described.values()):
        functions.append(f"{type(source).__name__} at {places}")
        return
    values.append([type(source).__name__, names, described])


_FUNCTION = object()
_CHOICES = ("pos", "head", "query_head", "rows")


def _as_json(value: Any) -> Any:
    """A field as JSON, equal where the field does the same; `_FUNCTION` for anything that cannot be seen into."""
    if isinstance(value, Tensor):
        return _FUNCTION if value.is_meta else ["tensor", tensor_fingerprint(value)]
    if isinstance(value, np.ndarray | np.generic):
        return _as_json(value.tolist())
    if isinstance(value, slice):
        return ["slice", *map(_as_json, (value.start, value.stop, value.step))]
    if isinstance(value, list | tuple | range):
        entries = [_as_json(entry) for entry in value]
        return _FUNCTION if any(entry is _FUNCTION for entry in entries) else ["list", *entries]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _FUNCTION
