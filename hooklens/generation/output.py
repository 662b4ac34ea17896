"""What a generation gives back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.display import (
    Displayed,
    Element,
    Listing,
    Summary,
    clip,
    element,
    format_number,
    sequential,
    visible,
)
from hooklens.generation.choosing.stopping import FinishReason

N_ALTERNATIVES = 5
"""Likeliest tokens that are kept of every step."""

_MOST_ROWS, _MOST_DRAWN = 100, 8
_MOST_TOLD, _MOST_LETTERS, _MOST_SPANS = 40, 100, 200


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationTiming:
    """Wall-clock times in seconds.

    Attributes:
        time_to_first_token: from the start until every row had its first token.
        total: from the start to the end.
        n_steps: tokens of the longest continuation.
    """

    time_to_first_token: float
    total: float
    n_steps: int

    @property
    def time_per_token(self) -> float | None:
        """Mean time of a step after the first, all rows together; None if there was but one."""
        if self.n_steps < 2:
            return None
        return (self.total - self.time_to_first_token) / (self.n_steps - 1)


class Alternative(NamedTuple):
    """A token that a step could have chosen.

    Attributes:
        token: its id.
        string: the token as text; its id in digits without a tokenizer.
        logprob: its log-probability in nats under the model itself, before penalties, the caller's processors,
            temperature and truncation.
    """

    token: int
    string: str
    logprob: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GenerationOutput(Displayed):
    """The result of a generation; row `i * num_return_sequences + j` is sample `j` of prompt `i`.

    Attributes:
        tokens: prompts and their continuations, end tokens included, rows filled up on the right with the
            tokenizer's padding token (0 without a tokenizer).
        prompt_lengths: tokens of each row that were given.
        n_new_tokens: tokens of each row that were generated.
        finish_reasons: why each row ended.
        logprobs: log-probabilities in nats of the new tokens under the model itself, before penalties, the
            caller's processors, temperature and truncation; 0 where a row has no token.
        text: tokens as text, without special tokens, as they read behind what came before them in a key-value cache;
            None without a tokenizer.
        cache: what `names_filter` captured, laid out as one run of `tokens[:, :-1]`, with an attention mask
            that leaves out each row's last token; None without a filter.
        timing: seconds.
        interrupted: the user broke off (Ctrl-C) and this is what there was.
        str_tokens: each row's tokens as strings, the prompt's and the new ones; None without a tokenizer.
        alternatives: of each row, for each new token the five likeliest tokens, the likeliest first; the new token is
            among them or not.
    """

    tokens: Int[Tensor, "rows pos"]
    prompt_lengths: list[int]
    n_new_tokens: list[int]
    finish_reasons: list[FinishReason]
    logprobs: Float[Tensor, "rows new"]
    text: list[str] | None
    cache: ActivationCache | None
    timing: GenerationTiming
    interrupted: bool = field(default=False)
    str_tokens: list[list[str]] | None = None
    alternatives: list[list[list[Alternative]]] = field(default_factory=list)

    @property
    def new_tokens(self) -> list[Int[Tensor, " new"]]:
        """The continuation of each row, unpadded."""
        lengths = zip(self.prompt_lengths, self.n_new_tokens, strict=True)
        return [row[start : start + n] for row, (start, n) in zip(self.tokens, lengths, strict=True)]

    @property
    def attention_mask(self) -> Bool[Tensor, "rows pos"]:
        """Which of `tokens` are tokens."""
        lengths = self.tokens.new_tensor(self.prompt_lengths) + self.tokens.new_tensor(self.n_new_tokens)
        columns = self.tokens.new_tensor(range(self.tokens.shape[1]))
        return columns < lengths[:, None]

    def _summary(self) -> Summary:
        timing, n_new = self.timing, sum(self.n_new_tokens)
        per_second = f", {n_new / timing.total:,.1f} tokens a second" if timing.total > 0 else ""
        reasons = ", ".join(f"{self.finish_reasons.count(one)} {one}" for one in dict.fromkeys(self.finish_reasons))
        rows = [
            (
                str(row),
                self.n_new_tokens[row],
                self.finish_reasons[row],
                float(self._logprobs_of(row).mean()) if self.n_new_tokens[row] else None,
                self._tell(row),
            )
            for row in range(min(len(self.tokens), _MOST_ROWS))
        ]
        return Summary(
            title=f"GenerationOutput: {n_new:,} new tokens in {len(self.tokens):,} rows"
            + (" (interrupted)" if self.interrupted else ""),
            facts={
                "ended": reasons or None,
                "time": f"{timing.total:.3g} s, {timing.time_to_first_token:.3g} s to the first token{per_second}",
                "captured": None if self.cache is None else f"{len(self.cache):,} activations",
            },
            listing=Listing(
                columns=("row", "new", "ended by", "mean log-prob", "continuation"),
                rows=rows,
                what="rows",
                n_rows=len(self.tokens),
                more="output.text has all",
            ),
            pages=[partial(self._draw_row, row) for row in range(min(len(self.tokens), _MOST_DRAWN))],
        )

    def _logprobs_of(self, row: int) -> Float[Tensor, " new"]:
        return self.logprobs[row, : self.n_new_tokens[row]]

    def _strings(self, row: int) -> list[str]:
        """The tokens of a row, the prompt's and the new ones: as strings, or their ids."""
        length = self.prompt_lengths[row] + self.n_new_tokens[row]
        return list(map(str, self.tokens[row, :length].tolist())) if self.str_tokens is None else self.str_tokens[row]

    def _tell(self, row: int) -> str:
        """The continuation of a row, in short."""
        start = self.prompt_lengths[row]
        new = self._strings(row)[start : start + _MOST_TOLD]
        more = "..." if self.n_new_tokens[row] > _MOST_TOLD else ""
        return clip(_gap(new).join(new) + more, _MOST_LETTERS)

    def _draw_row(self, row: int) -> Element:
        """The tokens of a row, the new ones the deeper in colour the more likely they were."""
        start, n_new = self.prompt_lengths[row], self.n_new_tokens[row]
        strings, logprobs = self._strings(row), self._logprobs_of(row)[:_MOST_SPANS].tolist()
        gap = _gap(strings)
        before = gap.join(strings[max(0, start - _MOST_SPANS) : start])
        spans = [
            (
                self._draw_token(row, number, string, logprob),
                # A place where a line may break.
                "\N{ZERO WIDTH SPACE}",
                gap,
            )
            for number, (string, logprob) in enumerate(zip(strings[start:], logprobs, strict=False))
        ]
        ended = f" ({n_new - len(logprobs):,} more tokens)" if n_new > len(logprobs) else ""
        told = element("span", f"row {row} ", "... " if start > _MOST_SPANS else "", before, class_="hl-faint")
        return element("p", told, spans, element("span", f" {ended}", class_="hl-faint"), class_="hl-code")

    def _draw_token(self, row: int, number: int, string: str, logprob: float) -> Element:
        """A new token, with what it was chosen from for mouse and keyboard."""
        told = f"{format_number(logprob)} nats, probability {format_number(math.exp(logprob))}"
        if row < len(self.alternatives):
            likeliest = self.alternatives[row][number]
            among = [f"{visible(one.string, 20)} {format_number(math.exp(one.logprob))}" for one in likeliest]
            told += "; likeliest: " + ", ".join(among)
        style = sequential(math.exp(logprob))
        return element(
            "span", visible(string), style=style, title=told, aria_label=f"{visible(string)}: {told}", tabindex=0
        )


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class GenerationStep(Displayed):
    """One step of a stream: a token for every row that had not ended.

    Attributes:
        tokens: padding where a row had ended before.
        is_new: which rows got a token in this step.
        text: the text that the step adds to each row, empty where a character is not complete yet; None
            without a tokenizer.
        logprobs: log-probabilities in nats under the model itself; 0 where a row had ended before.
        finish_reasons: why each row ended, in this step or before; None: it goes on.
    """

    tokens: Int[Tensor, " rows"]
    is_new: Bool[Tensor, " rows"]
    text: list[str] | None
    logprobs: Float[Tensor, " rows"]
    finish_reasons: list[FinishReason | None]

    def _summary(self) -> Summary:
        rows = [
            (
                str(row),
                str(int(self.tokens[row])) if self.is_new[row] else None,
                None if self.text is None else visible(self.text[row]),
                float(self.logprobs[row]) if self.is_new[row] else None,
                self.finish_reasons[row],
            )
            for row in range(min(len(self.tokens), _MOST_ROWS))
        ]
        return Summary(
            title=f"GenerationStep: {int(self.is_new.sum()):,} new tokens in {len(self.tokens):,} rows",
            listing=Listing(
                columns=("row", "token", "text", "log-prob", "ended by"),
                rows=rows,
                what="rows",
                n_rows=len(self.tokens),
                more="step.tokens has all",
            ),
        )


def _gap(strings: Sequence[str]) -> str:
    """What stands between tokens: nothing where they bring their spaces along."""
    return "" if any(" " in string for string in strings) else " "
