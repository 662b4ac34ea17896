"""Edits of experiments, made at random, and the reference for them: one full forward of one prompt for each patch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from hooklens import HookedCausalLM
from hooklens.axes import find_site
from hooklens.hooks import edits
from hooklens.hooks.edits import Edit
from tests.model.networks import activations_of
from tests.patching.naive import cell_index

WIDTH = 6
"""Tokens of the longest prompt."""

POSITIONS = [None, -1, 1, [0, -2], [2], slice(1, 3), slice(-2, None), slice(None)]


@dataclass(frozen=True)
class Made:
    """An edit as an experiment takes it, and what it comes to for one pair of a given length."""

    edit: Edit
    alone: Callable[[int, int], Edit | None]


def pick(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def mix(region: Tensor) -> Tensor:
    """A function that makes of each token what earlier and later ones are, too."""
    return 0.5 * region.cumsum(0) + 0.25 * region.flip(0)


@st.composite
def edits_of(
    draw, model: HookedCausalLM, lengths: Sequence[int], kinds: Sequence[str], names: Sequence[str] | None = None
):
    """An edit of some kind at some hook point, with all that it can choose."""
    name = draw(st.sampled_from(list(names or activations_of(model))))
    site = find_site(name)
    kind, n_pairs = draw(st.sampled_from(list(kinds))), len(lengths)
    if kind == "Project" and "key" in site.axes and len(set(lengths)) > 1:
        # No directions fit prompts with other numbers of keys.
        kind = "Scale"
    pos = draw(st.sampled_from(POSITIONS))
    rows = draw(st.sampled_from([None, None, 0, [-1], slice(1, None)]))
    chooses: dict = {"pos": pos}
    heads = next((axis for axis in ("head", "kv_head") if axis in site.axes), None)
    if heads:
        chooses["head"] = draw(st.sampled_from([None, 0, [0, -1] if model.cfg.size(heads) > 1 else [0]]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    pairs = list(range(n_pairs))[rows] if isinstance(rows, slice) else _listed(rows, n_pairs)
    if kind == "Custom":
        return _without_value(edits.Custom(name, mix, rows=rows, **chooses), pairs)
    if kind == "Mean":
        return _without_value(edits.Mean(name, rows=rows, **chooses), pairs)
    if kind == "Scale":
        return _without_value(edits.Scale(name, draw(st.sampled_from([0.0, 0.5, 2.0])), rows=rows, **chooses), pairs)
    if kind == "Zero":
        return _without_value(edits.Zero(name, rows=rows, **chooses), pairs)
    if kind == "Project":
        size = _sizes(model, name, site.axes[-1:])[0]
        return _without_value(edits.Project(name, pick(generator, 2, size), rows=rows, **chooses), pairs)
    layout = draw(st.sampled_from(["number", "vector", "region", "regions"]))
    return _with_value(getattr(edits, kind), model, name, chooses, rows, pairs, layout, generator)


def _listed(rows, n_pairs: int) -> list[int]:
    numbers = range(n_pairs) if rows is None else [rows] if isinstance(rows, int) else rows
    return [number % n_pairs for number in numbers]


def _sizes(model: HookedCausalLM, name: str, axes: Sequence[str]) -> list[int]:
    table = model.hook_table()
    shape = dict(zip(table["name"], table["shape"], strict=True))[name]
    by_axis = dict(zip(find_site(name).axes, shape, strict=True))
    return [WIDTH if axis in ("pos", "query", "key") else int(by_axis[axis]) for axis in axes]


def _without_value(edit: Edit, pairs: list[int]) -> Made:
    return Made(edit, lambda pair, length: _rebuild(edit) if pair in pairs else None)


def _rebuild(edit: Edit, **changes) -> Edit:
    # A prompt alone is row 0; a selection stays one.
    return replace(edit, rows=None if edit.rows is None else 0, **changes)


def _with_value(kind, model, name, chooses, rows, pairs, layout, generator) -> Made:
    if layout == "number":
        return _without_value(kind(name, 0.7, rows=rows, **chooses), pairs)
    axes = [axis for axis in find_site(name).axes if axis != "batch"]
    sizes = dict(zip(axes, _sizes(model, name, axes), strict=True))
    if layout == "vector":
        axes = axes[-1:]
    pos, head = chooses["pos"], chooses.get("head")
    position = next((axis for axis in ("query", "pos") if axis in axes), None)
    heads = next((axis for axis in ("head", "kv_head") if axis in axes), None)
    for axis, choice in ((position, pos), (heads, head)):
        if axis is not None and isinstance(choice, int):
            axes.remove(axis)
        elif axis is not None and isinstance(choice, list):
            sizes[axis] = len(choice)
    per_row = [sizes[axis] for axis in axes]
    value = pick(generator, *([len(pairs)] if layout == "regions" else []), *per_row)
    spans = pos is None or isinstance(pos, slice)

    def alone(pair: int, length: int) -> Edit | None:
        if pair not in pairs:
            return None
        own = value[pairs.index(pair)] if layout == "regions" else value
        for place, axis in enumerate(axes):
            if axis == "key" or (axis in ("pos", "query") and spans):
                own = own.narrow(place, 0, length)
        return _rebuild(edit, value=own)

    edit = kind(name, value, rows=rows, **chooses)
    return Made(edit, alone)


@torch.no_grad()
def logits_under(model, tokens: Tensor, made: Sequence[Made], pair: int, more: Sequence[Edit] = ()) -> Tensor:
    """The logits `[1 pos d_vocab]` of one prompt, in full."""
    standing = [one for each in made if (one := each.alone(pair, len(tokens))) is not None]
    return model.run_with_hooks(tokens[None], edits=[*standing, *more])


@torch.no_grad()
def patch_in_full(model, from_tokens: Tensor, into_tokens: Tensor, cell: dict, made: Sequence[Made], pair: int):
    """The logits of one patch, which acts after the edits."""
    name, index = cell["site"], cell_index(cell, cell["site"])
    taken: dict[str, Tensor] = {}
    take = edits.Custom(name, lambda tensor: taken.setdefault("value", tensor.clone()))
    logits_under(model, from_tokens, made, pair, [take])

    def put_in(tensor: Tensor) -> Tensor:
        patched = tensor.clone()
        patched[index] = taken["value"][index]
        return patched

    return logits_under(model, into_tokens, made, pair, [edits.Custom(name, put_in)])
