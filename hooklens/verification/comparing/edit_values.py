"""Edits as values: `Zero("blocks.0.attn.hook_z", pos=-1, head=2)` against the same written as a loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooklens.axes import find_site, layer_of
from hooklens.hooks import HookPoint
from hooklens.hooks.edits import Add, Edit, Mean, Project, Replace, Scale, Zero
from hooklens.verification.comparing.ways import Way, ragged_mask, runs_in_pieces
from hooklens.verification.explicit import Batch
from hooklens.verification.probe import ROUNDING_FACTOR, Probe, largest_difference
from hooklens.verification.report import CheckResult

VALUES = "edits by position, head and row change what they name"

_CHOICES: tuple[dict[str, Any], ...] = (
    {},
    {"pos": -1},
    {"pos": 0, "rows": [0, -1]},
    {"pos": [-1, 1], "rows": 1},
    {"pos": slice(1, -1)},
    {"head": -1},
    {"head": 0, "pos": -2},
    {"head": slice(0, 2), "pos": slice(-3, None), "rows": [0, 2]},
)


@dataclass(frozen=True)
class _Kind:
    """A kind of edit, and what it makes of the chosen entries, `[token ...]`."""

    make: Callable[..., Edit]
    compute: Callable[[Tensor], Tensor]


def check_edit_values(probe: Probe) -> Iterator[CheckResult]:
    """Every kind of edit with every choice of entries, on rows that are whole, padded, and go on from a cache."""
    names = [name for name in probe.names if name.endswith(("hook_resid_pre", "hook_z", "hook_pattern"))]
    names = [name for name in names if layer_of(name) == max(probe.layers)]
    half = probe.n_tokens // 2
    whole, ragged = torch.ones_like(probe.tokens, dtype=torch.bool), ragged_mask(probe.tokens, half)
    ways = [
        Way(label="whole", batch=Batch(tokens=probe.tokens, mask=whole), pieces=(probe.n_tokens,)),
        Way(label="padded", batch=Batch(tokens=probe.tokens, mask=ragged), pieces=(probe.n_tokens,)),
    ]
    if runs_in_pieces(probe):
        pieces = (half, probe.n_tokens - half)
        for mask, words in ((whole, "on a cache"), (ragged, "padded on a cache")):
            batch = Batch(tokens=probe.tokens, mask=mask)
            ways.append(Way(label=words, batch=batch, pieces=pieces, frozen=True))
    for name in names:
        site = find_site(name)
        if site is None:
            continue
        has_heads = "head" in site.axes or "kv_head" in site.axes
        for number, choice in enumerate(_CHOICES):
            if "head" in choice and not has_heads:
                continue
            for kind in _kinds(probe, name, site.axes) if number in (0, 1) else [_kinds(probe, name, site.axes)[0]]:
                for way in ways:
                    yield _check(probe, way, name, kind, choice)


def _kinds(probe: Probe, name: str, axes: tuple[str, ...]) -> list[_Kind]:
    width = probe.clean_captures[name].shape[-1]
    generator = torch.Generator().manual_seed(probe.seed)
    vector = torch.randn(width, generator=generator).to(probe.model.device, probe.dtype)
    kinds = [
        _Kind(Zero, torch.zeros_like),
        _Kind(lambda name, **choice: Scale(name, -0.5, **choice), lambda region: region * -0.5),
        _Kind(lambda name, **choice: Add(name, 0.25, **choice), lambda region: region + 0.25),
        _Kind(Mean, lambda region: region.mean(0).expand_as(region)),
    ]
    if axes[-1] != "key":
        unit = vector.double() / vector.double().norm()
        kinds += [
            _Kind(
                lambda name, **choice: Replace(name, vector, **choice),
                lambda region: vector.to(region.dtype).expand_as(region),
            ),
            _Kind(
                lambda name, **choice: Project(name, vector, **choice),
                lambda region: region - (region @ unit)[..., None] * unit,
            ),
        ]
    return kinds


def _check(probe: Probe, way: Way, name: str, kind: _Kind, choice: dict[str, Any]) -> CheckResult:
    edit = kind.make(name, **choice)

    def by_loop(tensor: Tensor, hook: HookPoint) -> Tensor:
        return _apply_by_loop(tensor, name, kind, choice, way)

    expected = way.run(probe.model, hooks=[(name, by_loop)]).last_logits
    found = way.run(probe.model, edits=[edit]).last_logits
    real = way.batch.mask[:, way.n_before :]
    measured, bound = largest_difference(found[real], expected[real]), probe.rounding
    if measured > bound:
        # What an edit leaves may be small beside what rounding made of it, and a norm behind it makes both large.
        generator = torch.Generator().manual_seed(probe.seed)

        def by_loop_of_rounded(tensor: Tensor, hook: HookPoint) -> Tensor:
            sign = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
            return by_loop(tensor * (1 + torch.finfo(tensor.dtype).eps * sign), hook)

        rounded = [way.run(probe.model, hooks=[(name, by_loop_of_rounded)]).last_logits for _ in range(2)]
        moved = max(largest_difference(one[real], expected[real]) for one in rounded)
        bound = max(bound, ROUNDING_FACTOR * moved)
    message = "" if measured <= bound else "the logits are those of an edit of other entries or values"
    words = ", ".join(f"{field}={value}" for field, value in choice.items()) or "everywhere"
    return CheckResult(
        check=VALUES, subject=f"{type(edit).__name__}({name!r}), {words}, {way.label}", measured=measured,
        bound=bound, message=message,
    )  # fmt: skip


def _apply_by_loop(tensor: Tensor, name: str, kind: _Kind, choice: dict[str, Any], way: Way) -> Tensor:
    """The edit as its documentation has it: one row, one token, one head after another."""
    site = find_site(name)
    assert site is not None
    heads_first = "query" in site.axes
    edited = tensor.clone()
    batch, n_before = way.batch, way.n_before
    rows = _take(list(range(len(tensor))), choice.get("rows"))
    places = []
    for row in rows:
        # No token sees padding, so whether it is edited does not matter.
        tokens = [column for column, real in enumerate(batch.mask[row].tolist()) if real]
        chosen = _take(tokens, choice.get("pos"))
        places += [(row, column - n_before) for column in chosen if column >= n_before]
    if not places:
        return edited
    heads = None
    if "head" in site.axes or "kv_head" in site.axes:
        n_heads = tensor.shape[1] if heads_first else tensor.shape[2]
        heads = _take(list(range(n_heads)), choice.get("head"))
    # A view with one token after another, whichever axes come first.
    by_token = edited.transpose(1, 2) if heads_first else edited
    index = [(row, column) if heads is None else (row, column, heads) for row, column in places]
    new = kind.compute(torch.stack([by_token[one].double() for one in index])).to(tensor.dtype)
    for one, values in zip(index, new, strict=True):
        by_token[one] = values
    return edited


def _take(entries: list[int], choice: Any) -> list[int]:
    """The chosen ones of a list, by a number, a slice, or several numbers."""
    if choice is None:
        return entries
    if isinstance(choice, int):
        return [entries[choice]]
    return entries[choice] if isinstance(choice, slice) else [entries[one] for one in choice]
