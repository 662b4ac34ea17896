"""Pairs of prompts: a clean one, and a corrupted one that differs in what is to be located.

Patching carries activations from one run into the other position by position, so the two prompts must have as
many tokens, and positions must mean the same in both (Zhang and Nanda 2023, "Towards Best Practices of
Activation Patching"). Replace a word by another of the same length rather than dropping it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching.pairs.answers import Answers, encode_answers
from hooklens.patching.pairs.noise import Noise, TokenNoise, draw_noise
from hooklens.patching.pairs.template import Pair, stack_pairs

Prompt = tokenization.Prompt
Mask = Int[Tensor, "batch pos"]

Corrupted = Prompt | Noise
"""What stands in the place of the corrupted prompts: prompts, or noise on the clean ones."""


@dataclass(frozen=True, kw_only=True)
class PromptPairs:
    """Pairs of prompts as token ids, padded on the right, so that columns are positions.

    Attributes:
        clean: ids `[pairs pos]`.
        corrupted: ids `[pairs pos]`.
        lengths: real tokens of each pair.
        answers, wrongs: one row for each pair, where pairs bring answers along.
        first: the number in the experiment that the first of these pairs has.
        is_part: these are some of the experiment's pairs, which come one after another.
        noise: what is added to the embeddings of the corrupted prompts; None: nothing.
    """

    clean: Int[Tensor, "pairs pos"]
    corrupted: Int[Tensor, "pairs pos"]
    lengths: tuple[int, ...]
    answers: Answers | None = None
    wrongs: Answers | None = None
    first: int = 0
    is_part: bool = False
    noise: TokenNoise | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def n_pairs(self) -> int | None:
        """How many pairs the experiment has; None: not known before the last one has come."""
        return None if self.is_part else len(self)

    @property
    def is_padded(self) -> bool:
        """Whether pairs differ in length."""
        return len(set(self.lengths)) > 1

    def take(self, rows: Sequence[int]) -> "PromptPairs":
        """Some of the pairs, which are then an experiment of their own."""
        chosen = list(rows)
        lengths = tuple(self.lengths[row] for row in chosen)
        width = max(lengths)
        return PromptPairs(
            clean=self.clean[chosen, :width],
            corrupted=self.corrupted[chosen, :width],
            lengths=lengths,
            answers=None if self.answers is None else self.answers.take(chosen),
            wrongs=None if self.wrongs is None else self.wrongs.take(chosen),
            noise=None if self.noise is None else self.noise.take(chosen),
        )

    def differ(self, pairs: Sequence[int], width: int) -> Bool[Tensor, "pairs pos"]:
        """The tokens in which the prompts of some pairs differ, those that are noised among them."""
        chosen = list(pairs)
        found: Tensor = self.clean[chosen, :width] != self.corrupted[chosen, :width]
        return found if self.noise is None else found | self.noise.chosen[chosen, :width]

    def draw_noise(
        self, pairs: Sequence[int], width: int, dtype: torch.dtype
    ) -> Float[Tensor, "pairs pos d_model"] | None:
        """What is added to the embeddings of some corrupted prompts; None: nothing."""
        return None if self.noise is None else self.noise.draw(pairs, width, dtype)

    @property
    def apart(self) -> list[list[int]]:
        """The pairs that may be parted from each other: each by itself, but the draws of one prompt together."""
        numbers = range(len(self)) if self.noise is None else self.noise.prompts
        together: dict[int, list[int]] = {}
        for pair, number in enumerate(numbers):
            together.setdefault(number, []).append(pair)
        return list(together.values())

    def split(self, size: int | None, among: Sequence[int] | None = None) -> Iterator[list[int]]:
        """The places of the pairs, or of those among them, in groups of so many; a size of None: all together."""
        places = range(len(self)) if among is None else among
        step = max(1, len(places) if size is None else size)
        for first in range(0, len(places), step):
            yield list(places[first : first + step])


def read_pairs(
    model: HookedCausalLM,
    clean: Prompt | Pair | Sequence[Pair],
    corrupted: Corrupted | None = None,
    attention_mask: Mask | None = None,
) -> PromptPairs:
    """Encode both prompts of one or several pairs, and check that they go together.

    Args:
        model: whose tokenizer and vocabulary count.
        clean: text, a list of texts, or ids; or a `Pair`, or a list of them.
        corrupted: the same, one for each clean prompt; None: the pairs have both. Or noise on the clean prompts, which
            takes the place of the corrupted ones of pairs, too.
        attention_mask: real tokens (1) and padding (0) of both, where ids are padded. None: as in a call of the
            model, see `hooklens.tokens.padding`.

    Raises:
        InputError: another number of prompts, pairs of prompts of different length, all of which are named, or
            answers that only some pairs have.
    """
    if isinstance(corrupted, Noise):
        return _read_noised(model, clean, corrupted, attention_mask)
    if corrupted is None:
        if not are_pairs(clean):
            raise InputError(
                "the corrupted prompts are missing: give clean and corrupted prompts, or a patching.Pair, a list of "
                "them, or a loader of them in place of both"
            )
        if attention_mask is not None:
            raise InputError("attention_mask goes with token ids; a Pair has no padding")
        return _read_stacked(model, [clean] if isinstance(clean, Pair) else list(clean))
    if isinstance(clean, Pair) or are_pairs(clean) or are_pairs(corrupted):
        raise InputError(
            "a prompt is a Pair; expected text or token ids in two places, or the pairs alone, in place of both (a "
            "pair's prompts are pair.clean and pair.corrupted)"
        )
    texts_or_ids: Prompt = clean  # type: ignore[assignment]  # a list that holds pairs and others is refused there
    return _align(read_prompts(model, texts_or_ids, attention_mask), read_prompts(model, corrupted, attention_mask))


def are_pairs(given: object) -> TypeGuard[Pair | Sequence[Pair]]:
    """Whether something is a pair, or a list of nothing but pairs."""
    if isinstance(given, Pair):
        return True
    return isinstance(given, list | tuple) and bool(given) and all(isinstance(one, Pair) for one in given)


def _read_noised(
    model: HookedCausalLM, clean: Prompt | Pair | Sequence[Pair], noise: Noise, attention_mask: Mask | None
) -> PromptPairs:
    """The clean prompts, each as many times as noise is drawn for it."""
    if are_pairs(clean):
        once = read_pairs(model, clean, None, attention_mask)
    else:
        rows = read_prompts(model, clean, attention_mask)  # type: ignore[arg-type]  # as below
        once = _align(rows, rows)
    every = [row for row in range(len(once)) for _ in range(noise.draws)]
    repeated = once.take(every)
    drawn = draw_noise(model, noise, once.clean, once.lengths)
    return replace(repeated, corrupted=repeated.clean, noise=drawn)


def _read_stacked(model: HookedCausalLM, pairs: Sequence[Pair]) -> PromptPairs:
    clean, corrupted, mask = stack_pairs(pairs)
    rows = [read_prompts(model, ids, mask) for ids in (clean, corrupted)]
    aligned = _align(*rows)
    answers, wrongs = (_answers_along(model, pairs, name) for name in ("answer", "wrong"))
    return PromptPairs(
        clean=aligned.clean, corrupted=aligned.corrupted, lengths=aligned.lengths, answers=answers, wrongs=wrongs
    )


def _answers_along(model: HookedCausalLM, pairs: Sequence[Pair], name: str) -> Answers | None:
    """The answers that pairs bring along: all of them, or none."""
    given = [getattr(pair, name) for pair in pairs]
    lacking = [number for number, one in enumerate(given) if one is None]
    if len(lacking) == len(pairs):
        return None
    if lacking:
        raise InputError(f"Pair: {name} is missing in pairs {lacking[:10]}, and given in others; give it in all")
    return encode_answers(model, given, what=f"Pair: {name}")


def _align(clean_rows: Sequence[Tensor], corrupted_rows: Sequence[Tensor]) -> PromptPairs:
    """Rows of both sides as pairs."""
    if len(clean_rows) != len(corrupted_rows):
        raise InputError(f"{len(clean_rows)} clean prompts and {len(corrupted_rows)} corrupted ones; expected as many")
    unequal = [
        f"pair {i}: {len(one)} clean and {len(other)} corrupted tokens"
        for i, (one, other) in enumerate(zip(clean_rows, corrupted_rows, strict=True))
        if len(one) != len(other)
    ]
    if unequal:
        raise InputError(
            f"prompts of different length cannot be aligned position by position ({'; '.join(unequal)}); replace words "
            "by words of as many tokens (model.to_str_tokens shows them)"
        )
    lengths = tuple(len(row) for row in clean_rows)
    return PromptPairs(clean=_pad_right(clean_rows), corrupted=_pad_right(corrupted_rows), lengths=lengths)


def read_prompts(model: HookedCausalLM, prompt: Prompt, attention_mask: Tensor | None) -> list[Int[Tensor, " _"]]:
    """The real tokens of each prompt.

    Raises:
        InputError: neither text nor ids, text without a tokenizer or with a mask, or a mask of another shape or
            without any token in a row.
    """
    return tokenization.read_prompts(
        prompt,
        model.tokenizer,
        d_vocab=model.cfg.d_vocab,
        n_ctx=model.cfg.n_ctx,
        attention_mask=attention_mask,
        prepend_bos=model.bos_rule(),
        device=model.device,
    )


def _pad_right(rows: Sequence[Tensor]) -> Int[Tensor, "pairs pos"]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
