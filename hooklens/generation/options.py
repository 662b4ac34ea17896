"""What a caller asks of a generation, checked before any work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict, get_args, runtime_checkable

from torch import Tensor

from hooklens.arguments import (
    MOST_ENTRIES,
    Reader,
    is_function,
    optional,
    read_flag,
    read_int,
    read_number,
    read_one_of,
    read_seed,
    refusal,
    require,
)
from hooklens.errors import HookLensError, InputError
from hooklens.hooks.arguments import read_edits
from hooklens.hooks.choice import read_choice
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.kv_cache import HookedKeyValueCache

LogitsFunction = Callable[[Tensor, Tensor], Tensor]
"""A processor in transformers' sense: (ids `[batch pos]`, scores `[batch d_vocab]`) to new scores."""
StopFunction = Callable[..., Tensor | bool]
"""A stopping criterion in transformers' sense: (ids `[batch pos]`, scores `[batch d_vocab]`) to bools `[batch]`."""
ReturnKind = Literal["input", "tokens", "str", "output"]


if TYPE_CHECKING:

    class GenerateKeywords(TypedDict, total=False):
        """Keywords of `generate` but for those that its type depends on, `return_type` and `num_return_sequences`."""

        max_new_tokens: int
        stop_at_eos: bool
        eos_token_id: int | Sequence[int] | None
        do_sample: bool
        temperature: float
        top_k: int | None
        top_p: float | None
        min_p: float | None
        freq_penalty: float
        repetition_penalty: float | None
        stop_strings: str | Sequence[str] | None
        use_past_kv_cache: bool
        past_kv_cache: HookedKeyValueCache | None
        prepend_bos: bool | None
        seed: int | None
        logits_processor: Sequence[LogitsFunction]
        stopping_criteria: Sequence[StopFunction]
        streamer: "Streamer | None"
        edits: Sequence[Edit]
        names_filter: NamesFilter
        verbose: bool


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
        eos_token_id: the end tokens; None: those of the checkpoint's generation_config.json, or the tokenizer's.
        do_sample: draw from the distribution; False: take the most likely token, which temperature, top-k, top-p
            and min-p do not change.
        temperature: divides the logits; 0 takes the most likely token, as `do_sample=False` does.
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
        prepend_bos: for text; None: `model.default_prepend_bos`.
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
        problems = self._read_values() or self._clashes()
        if problems:
            raise InputError("generate: " + "; ".join(problems))

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn. The limit of lower and lower temperatures is the most likely token."""
        return self.do_sample and self.temperature > 0

    @property
    def stop_texts(self) -> list[str]:
        """The stop strings as a list."""
        if self.stop_strings is None:
            return []
        return [self.stop_strings] if isinstance(self.stop_strings, str) else list(self.stop_strings)

    def _read_values(self) -> list[str]:
        """Bring values to plain ones, and say which cannot be."""
        problems = []
        for name, reader in _READERS.items():
            try:
                object.__setattr__(self, name, reader(getattr(self, name), what=name, error=InputError))
            except InputError as found:
                problems.append(str(found))
        return problems

    def _clashes(self) -> list[str]:
        problems = []
        if not self.samples and self.num_return_sequences != 1:
            greedy = "temperature=0" if self.do_sample else "do_sample=False"
            problems.append(
                f"num_return_sequences={self.num_return_sequences} with {greedy} would give the same row again "
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


def _read_stop_strings(given: object, *, what: str, error: type[HookLensError]) -> str | list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise refusal(given, what, "strings that are not empty", error)
    return given if isinstance(given, str) else list(texts)


def read_end_tokens(given: object, *, what: str, error: type[HookLensError] = InputError) -> int | list[int]:
    """One end token or several.

    Raises:
        HookLensError: anything else.
    """
    chosen = read_choice(given, what=what, error=error)
    if chosen is None or isinstance(chosen, slice):
        raise refusal(given, what, "a token id or a list of them", error)
    return chosen if isinstance(chosen, int) else list(chosen)


def _read_functions(given: object, *, what: str, error: type[HookLensError]) -> Sequence[Callable[..., Any]]:
    if not isinstance(given, Sequence) or not all(is_function(function) for function in given):
        raise refusal(given, what, "a list of functions of (ids, scores)", error)
    return given


def _number(expected: str, allows: Callable[[float], bool]) -> Reader:
    return partial(read_number, expected=expected, allows=allows)


_COUNT = partial(read_int, least=1, most=MOST_ENTRIES)
_READERS: dict[str, Reader] = {
    "max_new_tokens": _COUNT,
    "stop_at_eos": read_flag,
    "eos_token_id": optional(read_end_tokens),
    "do_sample": read_flag,
    "temperature": _number("a number >= 0 (0 takes the most likely token)", lambda number: number >= 0),
    "top_k": optional(_COUNT),
    "top_p": optional(_number("a probability in (0, 1]", lambda number: 0 < number <= 1)),
    "min_p": optional(_number("a fraction in [0, 1]", lambda number: 0 <= number <= 1)),
    "freq_penalty": _number("a finite number", lambda number: True),
    "repetition_penalty": optional(_number("a number > 0 (1 is no penalty)", lambda number: number > 0)),
    "stop_strings": optional(_read_stop_strings),
    "num_return_sequences": _COUNT,
    "use_past_kv_cache": read_flag,
    "past_kv_cache": optional(
        partial(require, kind=HookedKeyValueCache, expected="a HookedKeyValueCache, from model.prefill(prefix)")
    ),
    "prepend_bos": optional(read_flag),
    "seed": optional(read_seed),
    "logits_processor": _read_functions,
    "stopping_criteria": _read_functions,
    "edits": read_edits,
}
"""Readers of the options; what `names_filter` selects is looked up in the model."""


def read_streamer(given: object, *, what: str, error: type[HookLensError] = InputError) -> Streamer:
    """A streamer that a caller gave.

    Raises:
        HookLensError: something else, the class of one included.
    """
    if isinstance(given, Streamer) and not isinstance(given, type):
        return given
    raise refusal(given, what, "an object with put(tokens) and end(), as transformers' streamers", error)


DELIVERY: dict[str, Reader] = {
    "streamer": optional(read_streamer),
    "return_type": partial(read_one_of, options=get_args(ReturnKind)),
    "verbose": read_flag,
}
"""Readers of the keywords that say how the result is handed over."""
