"""Many contexts, each with a continuation to score: those that begin alike run what they share once.

This is what evaluation suites ask for: pairs in any order, of which many have the same context (the choices of a
question) and many more the same beginning (examples before the question). Numbers are those of each pair run alone.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.prefix import Prefix, check_edits, run_behind
from hooklens.evaluation.scoring import RowScore, score_rows
from hooklens.hooks.choice import Index, read_choice
from hooklens.hooks.edits import Edit

_SHOWN = 10


class Window(NamedTuple):
    """A continuation and what is seen of what stands before it, as token ids; neither is empty.

    All of its tokens run but the last, which is predicted.
    """

    context: tuple[int, ...]
    continuation: tuple[int, ...]

    @property
    def n_run(self) -> int:
        """How many tokens run."""
        return len(self.context) + len(self.continuation) - 1


class Group(NamedTuple):
    """Windows whose contexts begin alike.

    Attributes:
        prefix: how all of their contexts begin.
        members: which windows they are.
    """

    prefix: tuple[int, ...]
    members: list[int]


def cut_window(context: Sequence[int], continuation: Sequence[int], n_ctx: int) -> Window:
    """A pair as a window of which at most `n_ctx` tokens run: what is too much is cut from the context's start.

    Raises:
        InputError: there is no context or no continuation, or the continuation alone is too long.
    """
    if not context or not continuation:
        raise InputError(
            f"a context of {len(context)} and a continuation of {len(continuation)} tokens; expected at least one each"
        )
    if len(continuation) > n_ctx:
        raise InputError(
            f"a continuation of {len(continuation)} tokens is longer than the {n_ctx} that run at once; expected all "
            "of it to fit: shorten it, or score it in parts (a rolling log-likelihood)"
        )
    kept = n_ctx + 1 - len(continuation)
    return Window(tuple(context[-kept:]), tuple(continuation))


def score_windows(
    model: HookedCausalLM, windows: Sequence[Window], *, batch_size: BatchSize = "auto", edits: Sequence[Edit] = ()
) -> Iterator[dict[int, RowScore]]:
    """Score the continuation of each window; yields the scores of each batch by index of window.

    A context that several windows have runs once, behind what it shares with the context before it in the order of
    their tokens. Contexts that one window each has run as rows of a batch behind what all of them share.

    Args:
        model: scores.
        windows: what to score.
        batch_size: rows at once.
        edits: act on all tokens that run; positions are counted from a window's first token.

    Raises:
        InputError: edits that name rows, or positions that some window lacks or that count from the end, which is
            another place in each.
    """
    check_batch_size(batch_size)
    refuse_other_outputs(model.cfg, "scoring", InputError)
    check_edits(edits)
    _check_positions(windows, edits)
    previous: Prefix | None = None
    for group in group_windows([window.context for window in windows]):
        tokens = torch.tensor([group.prefix], device=model.device)
        previous = run_behind(model, previous, Prefix(tokens=tokens, edits=tuple(edits)))
        chosen = [windows[index] for index in group.members]
        rows = [[*window.context[len(group.prefix) :], *window.continuation] for window in chosen]
        n_scored = [len(window.continuation) for window in chosen]
        batches = score_rows(model, previous, rows, batch_size=batch_size, n_scored=n_scored, runs_last=False)
        for batch in batches:
            yield {group.members[place]: score for place, score in batch.items()}


def group_windows(contexts: Sequence[tuple[int, ...]]) -> Iterator[Group]:
    """Contexts that are worth running behind one prefix, in the order of their tokens.

    A context that stands there several times is a group. Those that stand there once are divided where two neighbours
    in the order of their tokens share so little that one of them would run more tokens again than it has of its own.
    """
    places = defaultdict(list)
    for index, context in enumerate(contexts):
        places[context].append(index)
    ordered = sorted(places)
    for context in ordered:
        if len(places[context]) > 1:
            yield Group(context, places[context])
    single = [context for context in ordered if len(places[context]) == 1]
    shared = [_count_shared(*pair) for pair in pairwise(single)]
    start = 0
    for end in range(1, len(single) + 1):
        if end < len(single) and _belong_together(single, shared, end):
            continue
        n_prefix = min(shared[start : end - 1], default=len(single[start]))
        members = [index for context in single[start:end] for index in places[context]]
        yield Group(single[start][:n_prefix], members)
        start = end


def _belong_together(ordered: Sequence[tuple[int, ...]], shared: Sequence[int], place: int) -> bool:
    """Whether a context joins the one before it, given how much neighbours share."""
    between = shared[place - 1]
    if not between:
        return False
    for index in (place - 1, place):
        most = max(shared[max(index - 1, 0) : index + 1])
        if most - between > len(ordered[index]) - most:
            return False
    return True


def _count_shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (left, right) in pairs if left != right), min(len(one), len(other)))


def _check_positions(windows: Sequence[Window], edits: Sequence[Edit]) -> None:
    """Refuse positions that are not the same token in every window, before any of them runs."""
    if not windows:
        return
    shortest = min(windows, key=lambda window: window.n_run).n_run
    for edit in edits:
        subject = f"{type(edit).__name__}({edit.name!r})"
        numbers = _numbers_of(read_choice(edit.pos, what=f"edit {subject}: pos"))
        if any(number < 0 for number in numbers):
            raise InputError(
                f"edit {subject}: pos={edit.pos!r} counts from the end, which in a context with its continuation is "
                "another place each time; give positions from the front, or None for all"
            )
        if isinstance(edit.pos, slice) or max(numbers, default=0) < shortest:
            continue
        short = [index for index, window in enumerate(windows) if window.n_run <= max(numbers)]
        more = f" and {len(short) - _SHOWN} more" if len(short) > _SHOWN else ""
        raise InputError(
            f"edit {subject}: pos={edit.pos!r} is no token of requests {', '.join(map(str, short[:_SHOWN]))}{more} of "
            f"{len(windows)}, of which fewer tokens run (the shortest: {shortest}); name positions that all have"
        )


def _numbers_of(index: Index) -> list[int]:
    """The numbers that name positions; of a slice its ends."""
    if index is None:
        return []
    if isinstance(index, slice):
        return [end for end in (index.start, index.stop) if end is not None]
    return [index] if isinstance(index, int) else list(index)
