"""Which captured columns a position means in each row, and a cache cut to them.

**The rule**, that of edits and of `logits_at`: positions count over a row's own tokens. 0 is its first one and -1 its
last one, on whichever side padding stands; padding has no position. Of a run that was captured in part the captured
tokens count.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.analysis.reading.connection import find_real_positions
from hooklens.errors import InputError
from hooklens.hooks.choice import Choice, read_choice, resolve_choice

_SHOWN = 10


def list_tokens(cache: ActivationCache, n_captured: int, n_rows: int) -> list[list[int]]:
    """The captured columns of each row that are tokens.

    Args:
        cache: the run.
        n_captured: columns that were captured.
        n_rows: rows of the batch.

    Raises:
        InputError: which columns are padding cannot be told, or nothing of a row but padding was captured.
    """
    real = find_real_positions(cache, n_captured)
    if real is None:
        return [list(range(n_captured)) for _ in range(n_rows)]
    rows = [row.nonzero()[:, 0].tolist() for row in real]
    empty = [index for index, row in enumerate(rows) if not row]
    if empty:
        raise InputError(
            f"no token of rows {empty[:_SHOWN]}{_and_more(empty)} was captured: the {n_captured} captured columns are "
            "padding there; capture without pos_slice, pad on the left, or leave these rows out"
        )
    return rows


def choose_tokens(tokens: list[list[int]], wanted: Choice, *, what: str) -> list[list[int]]:
    """Places among the tokens of each row.

    Args:
        tokens: of each row, as `list_tokens` gives them.
        wanted: positions; a slice is cut to what a row has, so rows can differ in how many they give.
        what: the argument, for messages.

    Raises:
        InputError: rows that lack a position (all of them are named), a position named twice, or no position at all.
    """
    index = read_choice(wanted, what=what)
    chosen, problems = [], []
    for row, columns in enumerate(tokens):
        try:
            chosen.append(resolve_choice(index, len(columns), what=f"{what}: row {row}", noun="captured tokens"))
        except InputError as problem:
            problems.append(str(problem))
    if problems:
        raise InputError("; ".join(problems[:_SHOWN]) + _and_more(problems))
    if not any(chosen):
        raise InputError(f"{what}={wanted!r} selects none of the {len(tokens[0])} captured tokens")
    return chosen


def _and_more(listed: list[int] | list[str]) -> str:
    return f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""


def take_columns(
    cache: ActivationCache, columns: Int[Tensor, "batch n"], n_captured: int, *, names: Iterable[str] | None = None
) -> ActivationCache:
    """The cache of some columns of each row, nothing of which is padding.

    Activations without one entry for each captured column (patterns, logits at chosen positions) are left out.

    Args:
        cache: the run.
        columns: of each row, the same number.
        n_captured: columns that were captured.
        names: what to keep of the cache, where it holds it; None: all.
    """
    taken: dict[int, Tensor] = {}
    tensors = {}
    for name in cache if names is None else [name for name in names if name in cache]:
        tensor = cache[name]
        axes = cache.axes_of(name)
        if axes is None or len(axes) != tensor.ndim or "pos" not in axes:
            continue
        axis = axes.index("pos")
        if axis > 1 or tensor.shape[axis] != n_captured:
            continue
        # The stream that leaves a block and the one that enters the next are one tensor.
        if id(tensor) not in taken:
            taken[id(tensor)] = _gather(tensor, axis, columns.to(tensor.device))
        tensors[name] = taken[id(tensor)]
    return ActivationCache(
        tensors,
        cfg=cache.cfg,
        transforms=cache.transforms,
        weights=cache.weights,
        has_batch_dim=cache.has_batch_dim,
    )


def _gather(tensor: Tensor, pos_axis: int, columns: Int[Tensor, "batch n"]) -> Tensor:
    if not pos_axis:
        return tensor[columns[0]]
    return tensor[torch.arange(len(columns), device=tensor.device)[:, None], columns]
