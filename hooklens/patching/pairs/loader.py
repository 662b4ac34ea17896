"""Pairs that come one after another: from a data loader, or from any iterable.

What comes is read batch by batch and handed on in groups, so that no more pairs are in memory than a group and a
batch of the loader. A batch is

- a `Pair`, or a list of them;
- a mapping with `"clean"` and `"corrupted"` (text, texts or ids), and where wanted `"attention_mask"` (of padded ids),
  `"answer"` and `"wrong"` (one for each row of the batch, or lists of several);
- a tuple or list `(clean, corrupted)` or `(clean, corrupted, attention_mask)`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.patching.pairs.answers import Answers, encode_answers
from hooklens.patching.pairs.prompts import Corrupted, Mask, Prompt, PromptPairs, are_pairs, read_pairs
from hooklens.patching.pairs.template import Pair

Loader = Iterable[Any]
GroupSize = Callable[[int], int]
"""From the tokens of the longest prompt to how many pairs a group may have."""

Pairs = Prompt | Pair | Sequence[Pair] | Loader | PromptPairs
"""What stands in the place of the clean prompts: these, or pairs, which have the corrupted ones with them.

`PromptPairs` are pairs that have been read before.
"""

Group = tuple[PromptPairs, list[int]]
"""Some pairs, and which of them are meant."""

_KEYS = ("clean", "corrupted", "attention_mask", "answer", "wrong")


class PairSource:
    """Where an experiment's pairs come from.

    Args:
        model: whose tokenizer and vocabulary count.
        known: all pairs, where they are at hand.
        batches: what a loader gives, where they come one after another.

    Attributes:
        at_hand: all pairs, or the first batch of a loader.
        n_pairs: how many pairs there are; None: not known before the last one has come.

    Raises:
        InputError: a loader that gives nothing.
    """

    def __init__(self, model: HookedCausalLM, known: PromptPairs | None, batches: Iterator[Any] | None = None) -> None:
        self._model, self._batches = model, batches
        self._n_read, self._number = 0, 0
        if known is None:
            first = self._read_next()
            if first is None:
                raise InputError("the loader of pairs gives nothing; expected at least one batch of pairs")
            known = first
        self.at_hand = known
        self.n_pairs = known.n_pairs

    def groups(self, size: GroupSize | None) -> Iterator[Group]:
        """The pairs in groups.

        Args:
            size: how many pairs a group may have; None: all stand in one group, which a loader does not allow.

        Raises:
            InputError: a batch that is none; its number is named.
        """
        if self._batches is None:
            for chosen in self.at_hand.split(None if size is None else size(max(self.at_hand.lengths))):
                yield self.at_hand, chosen
            return
        assert size is not None
        waiting: PromptPairs | None = self.at_hand
        while waiting is not None:
            while len(waiting) < size(max(waiting.lengths)):
                more = self._read_next()
                if more is None:
                    break
                waiting = _join(waiting, more)
            n_now = min(len(waiting), size(max(waiting.lengths)))
            rest = _cut(waiting, n_now, len(waiting)) if n_now < len(waiting) else None
            yield _cut(waiting, 0, n_now), list(range(n_now))
            waiting = rest if rest is not None else self._read_next()

    def _read_next(self) -> PromptPairs | None:
        """The next batch that a loader gives; None: it has given all."""
        assert self._batches is not None
        for batch in self._batches:
            try:
                pairs = _read_batch(self._model, batch)
            except HookLensError as error:
                raise type(error)(f"batch {self._number} of the loader: {error}") from error
            found = replace(pairs, first=self._n_read, is_part=True)
            self._n_read += len(pairs)
            self._number += 1
            return found
        return None


def read_source(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    attention_mask: Mask | None = None,
) -> PairSource:
    """The pairs that an experiment is given, at hand or from a loader.

    Args:
        model: whose tokenizer and vocabulary count.
        clean: clean prompts; or with `corrupted=None` a `Pair`, a list of them, a loader, or what was read before.
        corrupted: corrupted prompts, or noise on the clean ones.
        attention_mask: real tokens of padded ids, the same for both.

    Raises:
        InputError: prompts that do not go together; of a loader, only the first batch is read.
    """
    if isinstance(clean, PromptPairs):
        if corrupted is not None or attention_mask is not None:
            raise InputError(
                "the clean prompts are pairs that were read before, which have their corrupted prompts and no padding; "
                "leave corrupted and attention_mask out"
            )
        return PairSource(model, clean)
    if corrupted is None and _is_loader(clean):
        if attention_mask is not None:
            raise InputError("attention_mask goes with token ids; a loader gives it with each batch")
        return PairSource(model, None, iter(clean))
    at_hand: Prompt | Pair | Sequence[Pair] = clean  # type: ignore[assignment]
    return PairSource(model, read_pairs(model, at_hand, corrupted, attention_mask))


def read_all_pairs(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    attention_mask: Mask | None = None,
) -> PromptPairs:
    """The pairs that an experiment is given, as `read_source`; a loader is read to its end, as token ids.

    Raises:
        InputError: as `read_source`, and a batch that is none.
    """
    source = read_source(model, clean, corrupted, attention_mask)
    if source.n_pairs is not None:
        return source.at_hand
    [(pairs, _)] = source.groups(lambda width: sys.maxsize)
    return replace(pairs, is_part=False)


def _is_loader(given: object) -> TypeGuard[Loader]:
    """Whether something gives batches of pairs; texts and ids are prompts whose other side is missing."""
    if isinstance(given, str | bytes | Tensor | np.ndarray | Mapping) or not isinstance(given, Iterable):
        return False
    if isinstance(given, list | tuple):
        return bool(given) and not are_pairs(given) and all(_is_batch(one) for one in given)
    return True


def _is_batch(given: object) -> bool:
    return isinstance(given, Pair | Mapping) or are_pairs(given) or _is_tuple(given)


def _is_tuple(given: object) -> bool:
    """Whether something is both prompts, and no list of ids."""
    return isinstance(given, list | tuple) and len(given) in (2, 3) and not any(isinstance(one, int) for one in given)


def _read_batch(model: HookedCausalLM, batch: Any) -> PromptPairs:
    if are_pairs(batch):
        return read_pairs(model, batch)
    if isinstance(batch, Mapping):
        unknown = [key for key in batch if key not in _KEYS]
        missing = [key for key in _KEYS[:2] if key not in batch]
        if unknown or missing:
            raise InputError(f"keys {unknown} are unknown, {missing} missing; expected {list(_KEYS)}, the first two")
        pairs = read_pairs(model, batch["clean"], batch["corrupted"], batch.get("attention_mask"))
        answers, wrongs = (_answers_of(model, batch.get(name), len(pairs), name) for name in ("answer", "wrong"))
        return replace(pairs, answers=answers, wrongs=wrongs)
    if _is_tuple(batch):
        return read_pairs(model, *batch)
    raise InputError(
        f"it is {show(batch)}; expected a Pair, a list of them, a mapping with 'clean' and 'corrupted', or a tuple of "
        "both"
    )


def _answers_of(model: HookedCausalLM, given: object, n_rows: int, name: str) -> Answers | None:
    if given is None:
        return None
    answers = encode_answers(model, given, what=name)
    if len(answers.ids) != n_rows:
        raise InputError(f"{name}: {len(answers.ids)} tokens for {n_rows} pairs; expected one for each")
    return answers


def _join(one: PromptPairs, other: PromptPairs) -> PromptPairs:
    """Pairs and those that follow them."""
    width = max(one.clean.shape[1], other.clean.shape[1])
    return replace(
        one,
        clean=torch.cat([_widen(ids, width) for ids in (one.clean, other.clean)]),
        corrupted=torch.cat([_widen(ids, width) for ids in (one.corrupted, other.corrupted)]),
        lengths=one.lengths + other.lengths,
        answers=_join_answers(one.answers, other.answers, "answer"),
        wrongs=_join_answers(one.wrongs, other.wrongs, "wrong"),
    )


def _join_answers(one: Answers | None, other: Answers | None, name: str) -> Answers | None:
    if one is None and other is None:
        return None
    if one is None or other is None:
        raise InputError(f"{name} is given in some batches of the loader, and missing in others; give it in all")
    width = max(one.ids.shape[1], other.ids.shape[1])
    firsts = torch.cat([one.ids[:, :1], other.ids[:, :1]])
    real = torch.cat([_widen(answers.real, width) for answers in (one, other)])
    ids = torch.cat([_widen(answers.ids, width) for answers in (one, other)])
    return Answers(torch.where(real, ids, firsts), real)


def _widen(rows: Tensor, width: int) -> Tensor:
    return F.pad(rows, (0, width - rows.shape[1]))


def _cut(pairs: PromptPairs, first: int, stop: int) -> PromptPairs:
    """Some of the pairs that stand side by side, as wide as the longest of them."""
    lengths = pairs.lengths[first:stop]
    width = max(lengths)
    rows = list(range(first, stop))
    return replace(
        pairs,
        clean=pairs.clean[first:stop, :width],
        corrupted=pairs.corrupted[first:stop, :width],
        lengths=lengths,
        answers=None if pairs.answers is None else pairs.answers.take(rows),
        wrongs=None if pairs.wrongs is None else pairs.wrongs.take(rows),
        first=pairs.first + first,
    )
