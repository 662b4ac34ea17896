"""What a caller asks of a generation, checked before any work."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from torch import Tensor

from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.kv_cache import HookedKeyValueCache

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
"""A processor in transformers' sense: (ids `[batch pos]`, scores `[batch d_vocab]`) to new scores."""
StopFunction = Callable[..., Tensor | bool]
"""A stopping criterion in transformers' sense: (ids `[batch pos]`, scores `[batch d_vocab]`) to bools `[batch]`."""
ReturnKind = Literal["input", "tokens", "str", "output"]


@runtime_checkable
class Streamer(Protocol):
    """What takes the tokens as they come; transformers' streamers are of this kind."""

    def put(self, value: Any) -> None:
        """Take the prompts `[batch pos]` first, then the tokens `[batch]` of every step."""

    def end(self) -> None:
        """No more tokens come."""


@dataclass(frozen=True, kw_only=True, eq=False)
class GenerationOptions:
    """The keywords of `model.generate` that decide which tokens come out.

    Attributes:
        max_new_tokens: most tokens to add to a prompt.
        stop_at_eos: a row ends with the first end token.
        eos_token_id: the end tokens; None: the tokenizer's.
        do_sample: draw from the distribution; False: take the most likely token, which temperature, top-k, top-p
            and min-p do not change.
        temperature: divides the logits, > 0.
        top_k: keep the k most likely tokens (ties are kept).
        top_p: keep the smallest set of most likely tokens with at least this probability, in (0, 1].
        min_p: keep tokens at least this fraction as likely as the most likely one, in [0, 1].
        freq_penalty: taken off a token's logit for each time the row holds it.
        repetition_penalty: > 0; logits of tokens that the row holds are divided by it if positive, multiplied
            if negative.
        stop_strings: a row ends when its new text holds one of them.
        num_return_sequences: samples of each prompt.
        use_past_kv_cache: keep keys and values; False runs the whole sequence at every step.
        past_kv_cache: what came before the prompts.
        prepend_bos: for text; None: the tokenizer's own rule.
        seed: of the draws; None: from torch's global generator.
        logits_processor: processors of the caller's own, run after the penalties and before temperature.
        stopping_criteria: functions that end rows.
        edits: interventions, see `hooklens.edits`.
        names_filter: activations to keep; None: none.
    """

    max_new_tokens: int = 10
    stop_at_eos: bool = True
    eos_token_id: int | Sequence[int] | None = None
    do_sample: bool = True
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    freq_penalty: float = 0.0
    repetition_penalty: float | None = None
    stop_strings: str | Sequence[str] | None = None
    num_return_sequences: int = 1
    use_past_kv_cache: bool = True
    past_kv_cache: HookedKeyValueCache | None = None
    prepend_bos: bool | None = None
    seed: int | None = None
    logits_processor: Sequence[LogitsFunction] = ()
    stopping_criteria: Sequence[StopFunction] = ()
    edits: Sequence[Edit] = ()
    names_filter: NamesFilter = None

    def __post_init__(self) -> None:
        """Check all values.

        Raises:
            InputError: values outside their ranges, or that exclude each other; all of them are named.
        """
        problems = [*self._bad_numbers(), *self._bad_things(), *self._clashes()]
        if problems:
            raise InputError("generate: " + "; ".join(problems))

    @property
    def stop_texts(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop_strings is None:
            return []
        return [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings)

    def _bad_numbers(self) -> list[str]:
        problems = []
        for name in ("max_new_tokens", "num_return_sequences"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                problems.append(f"{name} is {value!r}, expected a whole number >= 1")
        if self.top_k is not None and (not _is_whole(self.top_k) or self.top_k < 1):
            problems.append(f"top_k is {self.top_k!r}, expected a whole number >= 1, or None for all tokens")
        if self.seed is not None and not _is_whole(self.seed):
            problems.append(f"seed is {self.seed!r}, expected a whole number")
        if not _is_finite(self.temperature) or self.temperature <= 0:
            problems.append(
                f"temperature is {self.temperature!r}, expected a number > 0 (do_sample=False takes the most likely "
                "token)"
            )
        if self.top_p is not None and not (_is_finite(self.top_p) and 0 < self.top_p <= 1):
            problems.append(f"top_p is {self.top_p!r}, expected a probability in (0, 1]")
        if self.min_p is not None and not (_is_finite(self.min_p) and 0 <= self.min_p <= 1):
            problems.append(f"min_p is {self.min_p!r}, expected a fraction in [0, 1]")
        if not _is_finite(self.freq_penalty):
            problems.append(f"freq_penalty is {self.freq_penalty!r}, expected a finite number")
        penalty = self.repetition_penalty
        if penalty is not None and not (_is_finite(penalty) and penalty > 0):
            problems.append(f"repetition_penalty is {penalty!r}, expected a number > 0 (1 is no penalty)")
        return problems

    def _bad_things(self) -> list[str]:
        problems = []
        if any(not isinstance(text, str) or not text for text in self.stop_texts):
            problems.append(f"stop_strings is {self.stop_strings!r}, expected strings that are not empty")
        for name in ("logits_processor", "stopping_criteria"):
            given = getattr(self, name)
            if not isinstance(given, Sequence) or not all(callable(function) for function in given):
                problems.append(f"{name} is {given!r}, expected a list of functions of (ids, scores)")
        wrong = [type(edit).__name__ for edit in self.edits if not isinstance(edit, Edit)]
        if wrong:
            problems.append(f"edits holds {', '.join(wrong)}, expected values from hooklens.edits")
        return problems

    def _clashes(self) -> list[str]:
        problems = []
        if not self.do_sample and self.num_return_sequences != 1:
            problems.append(
                f"num_return_sequences={self.num_return_sequences} with do_sample=False would give the same row again "
                "and again, leave one of them out"
            )
        if not self.stop_at_eos and self.eos_token_id is not None:
            problems.append(f"eos_token_id={self.eos_token_id!r} is given and stop_at_eos=False, leave one of them out")
        cache = self.past_kv_cache
        if cache is not None and not self.use_past_kv_cache:
            problems.append("past_kv_cache is given and use_past_kv_cache=False, leave one of them out")
        if cache is not None and not cache.frozen and self.num_return_sequences != 1:
            problems.append(
                f"num_return_sequences={self.num_return_sequences} cannot be appended to the rows of past_kv_cache, "
                "freeze it (it is then read, not written)"
            )
        return problems


def check_return_type(return_type: object) -> None:
    """Refuse what is no `ReturnKind`.

    Raises:
        InputError: another value.
    """
    if return_type not in get_args(ReturnKind):
        raise InputError(f"generate: return_type is {return_type!r}; expected 'input', 'tokens', 'str' or 'output'")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
