"""Log-probabilities of rows of tokens behind one prefix, batch by batch."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.evaluation.batching import BatchSize, check_batch_size, plan_batches
from hooklens.evaluation.prefix import Prefix
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.precision import widen

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class RowScore:
    """The score of one continuation.

    Attributes:
        logprobs: of each token given what stands before it, in nats.
        is_greedy: every token is the most likely one at its place.
    """

    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of the whole continuation, in nats."""
        return math.fsum(self.logprobs)


class _Row(NamedTuple):
    """A row of tokens, and how many of them, at its end, are scored."""

    ids: Sequence[int]
    n_scored: int


def score_rows(
    model: HookedCausalLM,
    prefix: Prefix,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: BatchSize = "auto",
    n_scored: Sequence[int] | None = None,
    runs_last: bool = True,
) -> Iterator[dict[int, RowScore]]:
    """Score continuations, given as token ids; yields the scores of each batch by index of row.

    Args:
        model: scores.
        prefix: what stands before all rows.
        rows: token ids.
        batch_size: rows at once.
        n_scored: of each row, how many tokens at its end are scored; None: all.
        runs_last: edits count the last token of a row, so it has to fit the context. False: it is predicted and never
            runs, so that a row may be one token longer.

    Raises:
        InputError: rows that do not fit the model's context.
    """
    listed = [_Row(row, len(row)) for row in rows] if n_scored is None else list(map(_Row, rows, n_scored))
    for batch in plan_rows(model, prefix, rows, batch_size=batch_size, runs_last=runs_last):
        chosen = [listed[index] for index in batch]
        scores = _score_together(model, prefix, chosen, runs_last=runs_last, may_halve=batch_size == "auto")
        yield dict(zip(batch, scores, strict=True))


def plan_rows(
    model: HookedCausalLM,
    prefix: Prefix,
    rows: Sequence[Sequence[int]],
    *,
    batch_size: BatchSize = "auto",
    runs_last: bool = True,
) -> Iterator[list[int]]:
    """Which rows run together, in the order in which they do; arguments as of `score_rows`.

    Raises:
        InputError: rows that do not fit the model's context.
    """
    check_batch_size(batch_size)
    check_context(model, len(prefix), [len(row) for row in rows], runs_last=runs_last)
    whole = [index for index, row in enumerate(rows) if prefix.cache_for(model, len(prefix) + len(row)) is None]
    yield from ([index] for index in whole)
    apart = set(whole)
    on_cache = [index for index in range(len(rows)) if index not in apart]
    lengths = [len(rows[index]) for index in on_cache]
    for batch in plan_batches(model, lengths, n_prefix=len(prefix), batch_size=batch_size):
        yield [on_cache[index] for index in batch]


def score_together(
    model: HookedCausalLM, prefix: Prefix, rows: Sequence[Sequence[int]], *, may_halve: bool
) -> list[RowScore]:
    """Score rows that `plan_rows` has put together.

    Args:
        model, prefix: as of `score_rows`.
        rows: token ids.
        may_halve: where memory runs out, go on in halves.
    """
    return _score_together(model, prefix, [_Row(row, len(row)) for row in rows], runs_last=True, may_halve=may_halve)


def _score_together(
    model: HookedCausalLM, prefix: Prefix, rows: list[_Row], *, runs_last: bool, may_halve: bool
) -> list[RowScore]:
    if len(rows) == 1 and prefix.cache_for(model, len(prefix) + len(rows[0].ids)) is None:
        return [_score_whole(model, prefix, rows[0], runs_last=runs_last)]
    return _score_or_halve(model, prefix, rows, may_halve=may_halve)


def check_context(model: HookedCausalLM, n_prefix: int, lengths: Sequence[int], *, runs_last: bool = True) -> None:
    """Check that each row fits behind the prefix; without its last token, if that does not run.

    Raises:
        InputError: some do not; all are named.
    """
    n_ctx = model.cfg.n_ctx
    most = n_ctx if runs_last else n_ctx + 1
    too_long = [f"{index} ({length} tokens)" for index, length in enumerate(lengths) if n_prefix + length > most]
    if too_long:
        more = f" and {len(too_long) - _SHOWN} more" if len(too_long) > _SHOWN else ""
        raise InputError(
            f"continuations {', '.join(too_long[:_SHOWN])}{more} do not fit behind a prefix of {n_prefix} tokens: the "
            f"model has n_ctx={n_ctx}; shorten the prefix or leave them out"
        )


def _score_or_halve(model: HookedCausalLM, prefix: Prefix, rows: list[_Row], *, may_halve: bool) -> list[RowScore]:
    """Score a batch; where the estimate was too low and memory runs out, in halves."""
    cache = prefix.cache
    assert cache is not None
    try:
        return _score_batch(model, prefix, cache, rows)
    except torch.OutOfMemoryError:
        if not may_halve or len(rows) == 1:
            raise
    middle = len(rows) // 2
    return [
        score
        for part in (rows[:middle], rows[middle:])
        for score in _score_or_halve(model, prefix, part, may_halve=True)
    ]


@torch.no_grad()
def _score_batch(model: HookedCausalLM, prefix: Prefix, cache: HookedKeyValueCache, rows: list[_Row]) -> list[RowScore]:
    assert cache.last_logits is not None
    lengths = [len(row.ids) for row in rows]
    width, n_last = max(lengths), max(row.n_scored for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.as_tensor(row.ids)
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    ids, mask = ids.to(model.device), mask.to(model.device)
    if n_last < min(lengths):
        # Only what predicts the scored tokens is unembedded: as many of each row's last tokens as any row needs.
        logits = model.run_with_hooks(
            ids[:, :-1],
            edits=prefix.edits,
            attention_mask=mask[:, 1:],
            past_kv_cache=cache,
            logits_at=range(-n_last, 0),
        )
        targets = torch.tensor([list(row.ids[-n_last:]) for row in rows], device=model.device)
        return _read_ends(*_score_tokens(logits, targets), [n_last] * len(rows), rows)
    logprobs, is_best = _score_tokens(cache.last_logits[:, None].expand(len(rows), -1, -1), ids[:, :1])
    if width > 1:
        # A row of one token takes part with a token that stands for nothing, since none may be empty.
        run_mask = mask[:, 1:].clone()
        run_mask[:, 0] = True
        logits = model.run_with_hooks(ids[:, :-1], edits=prefix.edits, attention_mask=run_mask, past_kv_cache=cache)
        later, later_best = _score_tokens(logits, ids[:, 1:])
        logprobs, is_best = torch.cat([logprobs, later], 1), torch.cat([is_best, later_best], 1)
    return _read_ends(logprobs, is_best, lengths, rows)


def _read_ends(
    logprobs: Float[Tensor, "batch pos"], is_best: Bool[Tensor, "batch pos"], lengths: list[int], rows: list[_Row]
) -> list[RowScore]:
    """The scores of rows, from those of their tokens: so many columns of each are tokens of the row."""
    return [
        RowScore(logprobs=row[length - n_scored : length], is_greedy=all(best[length - n_scored : length]))
        for row, best, length, (_, n_scored) in zip(logprobs.tolist(), is_best.tolist(), lengths, rows, strict=True)
    ]


@torch.no_grad()
def _score_whole(model: HookedCausalLM, prefix: Prefix, row: _Row, *, runs_last: bool) -> RowScore:
    """Score one sequence run from its start, alone."""
    targets = torch.as_tensor(row.ids, device=model.device)[None]
    tokens = torch.cat([prefix.tokens, targets], dim=1)
    run = tokens if runs_last else tokens[:, :-1]
    logits = model.run_with_hooks(run, edits=prefix.edits, attention_mask=torch.ones_like(run))
    scores = _score_tokens(logits[:, len(prefix) - 1 : tokens.shape[1] - 1], targets)
    return _read_ends(*scores, [len(row.ids)], [row])[0]


def _score_tokens(
    logits: Float[Tensor, "batch pos d_vocab"], targets: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """Log-probabilities in nats, float32 at least, and whether each target is the most likely token."""
    wide, wanted = widen(logits), targets.to(logits.device)
    logprobs = wide.gather(-1, wanted[..., None])[..., 0] - wide.logsumexp(-1)
    # Beside the targets, which on several devices is not where logits come out.
    return logprobs.to(targets.device), (wide.argmax(-1) == wanted).to(targets.device)
