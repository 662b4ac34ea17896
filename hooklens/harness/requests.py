"""What the harness asks to be generated: contexts with keywords, grouped into batches that run alike."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hooklens.arguments import MOST_ENTRIES, Reader, optional, read_flag, read_int, read_number, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.evaluation.batching import BatchSize, plan_batches

# What the harness takes in the place of its own `max_gen_toks`, the first that is given.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_READERS: dict[str, Reader] = {
    "do_sample": optional(read_flag),
    "temperature": optional(partial(read_number, expected="a number >= 0", allows=lambda number: number >= 0)),
    "top_k": optional(partial(read_int, least=0)),
    "top_p": optional(partial(read_number, expected="a number in (0, 1]", allows=lambda number: 0 < number <= 1)),
    "min_p": optional(partial(read_number, expected="a number in [0, 1]", allows=lambda number: 0 <= number <= 1)),
    "repetition_penalty": optional(partial(read_number, expected="a number > 0", allows=lambda number: number > 0)),
}
# What asks for a search over several sequences, but for the value that asks for none.
_ONE = ("num_beams", "num_return_sequences")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Keywords of `generate_until`, as `model.generate` takes them.

    Attributes:
        until: texts at which an answer ends, without them.
        max_new_tokens: most tokens of an answer.
        sampling: keywords that say how tokens are chosen.
    """

    until: tuple[str, ...]
    max_new_tokens: int
    sampling: dict[str, Any]

    def cut(self, text: str) -> str:
        """An answer up to the first of the texts that end it."""
        for end in self.until:
            text = text.partition(end)[0]
        return text


def read_asked(given: Mapping[str, Any], max_gen_toks: int) -> Asked:
    """The keywords of a request; greedy unless it gives a temperature or `do_sample=True`, as in the harness.

    Args:
        given: what the request, or the command line's `--gen_kwargs`, says.
        max_gen_toks: most tokens of an answer where it does not say.

    Raises:
        InputError: keywords that are not known, or values that they do not take; all are named.
    """
    left = dict(given)
    lengths = {name: left.pop(name) for name in _LENGTHS if left.get(name) is not None}
    length = next(iter(lengths.values()), max_gen_toks)
    until = left.pop("until", None) or []
    until = [until] if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(end, str) for end in until):
        raise InputError(f"generation_kwargs: until is {show(until)}, expected a text or a list of texts")
    beyond = {name: left.pop(name) for name in _ONE if name in left}
    known = {name: left.pop(name) for name in _READERS if name in left}
    left = {name: value for name, value in left.items() if name not in _LENGTHS}
    left |= {name: value for name, value in beyond.items() if value not in (None, 1)}
    if left:
        found = ", ".join(f"{name}={show(value)}" for name, value in left.items())
        raise InputError(
            f"generation_kwargs: {found} cannot be generated with; expected until, max_gen_toks, "
            f"{join_names(list(_READERS))}: leave others out (a task's own can be overridden by --gen_kwargs)"
        )
    read = {name: _READERS[name](value, what=f"generation_kwargs: {name}") for name, value in known.items()}
    sampling = {name: value for name, value in read.items() if value is not None}
    sampling.setdefault("do_sample", sampling.get("temperature", 0.0) > 0)
    if not sampling["do_sample"]:
        penalty = {"repetition_penalty"} & sampling.keys()
        sampling = {"do_sample": False, **{name: sampling[name] for name in penalty}}
    elif not sampling.get("top_k"):
        # 0 is transformers' word for all of them.
        sampling.pop("top_k", None)
    return Asked(
        until=tuple(end for end in until if end),
        max_new_tokens=read_int(length, what="generation_kwargs: max_gen_toks", least=1, most=MOST_ENTRIES),
        sampling=sampling,
    )


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Requests that run in one call.

    Attributes:
        members: which requests they are.
        asked: their keywords.
        ids: rows of one length, where texts will not do: contexts without a token of their own, or cut from the left.
    """

    members: list[int]
    asked: Asked
    ids: list[list[int]] | None


def plan_prompts(
    model: HookedCausalLM,
    rows: Sequence[list[int]],
    asked: Sequence[Asked],
    *,
    max_length: int,
    prefix: int,
    batch_size: BatchSize,
) -> Iterator[PromptBatch]:
    """Requests with the same keywords together, those of similar length in one batch.

    Args:
        model: generates.
        rows: the tokens of each context.
        asked: the keywords of each request.
        max_length: tokens of a context with its answer; a context that is too long loses its first ones.
        prefix: the token that stands for a context without one.
        batch_size: rows at once.

    Raises:
        InputError: answers that leave no room for a context; before the first batch.
    """
    too_long = sorted({one.max_new_tokens for one in asked if one.max_new_tokens >= max_length})
    if too_long:
        raise InputError(
            f"generation_kwargs: max_gen_toks is {', '.join(map(str, too_long))}, and a context and its answer have "
            f"room for {max_length} tokens together; ask for fewer, in the task or by --gen_kwargs max_gen_toks=..."
        )
    alike: dict[tuple[str, bool], list[int]] = defaultdict(list)
    for index, (row, one) in enumerate(zip(rows, asked, strict=True)):
        is_text = 0 < len(row) <= max_length - one.max_new_tokens
        alike[json.dumps([one.until, one.max_new_tokens, one.sampling], sort_keys=True), is_text].append(index)
    for (_, is_text), members in alike.items():
        one = asked[members[0]]
        cut = [rows[index][-(max_length - one.max_new_tokens) :] or [prefix] for index in members]
        lengths = [len(row) + one.max_new_tokens for row in cut]
        for batch in plan_batches(model, lengths, n_prefix=0, batch_size=batch_size):
            if is_text:
                yield PromptBatch(members=[members[place] for place in batch], asked=one, ids=None)
                continue
            by_length = defaultdict(list)
            for place in batch:
                by_length[len(cut[place])].append(place)
            for places in by_length.values():
                ids = [cut[place] for place in places]
                yield PromptBatch(members=[members[place] for place in places], asked=one, ids=ids)
