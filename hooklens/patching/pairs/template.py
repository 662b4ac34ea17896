"""Pairs of prompts from a template, with names for their positions.

A template is a text with fields, such as `"When {a} and {b} went to the store, {s} gave a drink to"`. Filled in
twice it gives a clean and a corrupted prompt, and each field names the positions that its words take.
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Listing, Summary, sequential, visible
from hooklens.errors import InputError, suggest_names
from hooklens.patching.pairs.answers import Token, list_answers

Fields = Mapping[str, str]


@dataclass(frozen=True, eq=False, repr=False)
class Pair(Displayed):
    """A clean and a corrupted prompt of as many tokens.

    Attributes:
        clean, corrupted: token ids; `from_text` and `from_template` encode text.
        clean_tokens, corrupted_tokens: the same as strings; by default the ids as text.
        spans: for each field of the template, the positions of its words.
        answer, wrong: the token that the clean prompt calls for and the one that it does not, or lists of several;
            for metrics that are given none, such as `LogitDiff()`.

    Raises:
        InputError: text in place of ids, prompts of different length, or answers that are no tokens.
    """

    clean: Int[Tensor, " pos"]
    corrupted: Int[Tensor, " pos"]
    _: KW_ONLY
    clean_tokens: tuple[str, ...] = ()
    corrupted_tokens: tuple[str, ...] = ()
    spans: Mapping[str, range] = field(default_factory=dict)
    answer: Token | Sequence[Token] | Int[Tensor, "..."] | None = None
    wrong: Token | Sequence[Token] | Int[Tensor, "..."] | None = None

    def __post_init__(self) -> None:
        wrong = [ids for ids in (self.clean, self.corrupted) if not isinstance(ids, Tensor) or ids.ndim != 1]
        if wrong:
            raise InputError(
                f"Pair takes token ids [pos], got {type(wrong[0]).__name__}; Pair.from_text(model, clean, corrupted) "
                "encodes text"
            )
        if len(self.clean) != len(self.corrupted):
            raise InputError(
                f"the clean prompt has {len(self.clean)} tokens, the corrupted one {len(self.corrupted)}; positions "
                "can be compared only if they have as many"
            )
        for name, ids in (("clean_tokens", self.clean), ("corrupted_tokens", self.corrupted)):
            if not getattr(self, name):
                object.__setattr__(self, name, tuple(map(str, ids.tolist())))
        for name in ("answer", "wrong"):
            if getattr(self, name) is not None:
                list_answers([getattr(self, name)], what=f"Pair: {name}")

    def _summary(self) -> Summary:
        differs = [one != other for one, other in zip(self.clean_tokens, self.corrupted_tokens, strict=True)]
        field_at = {pos: name for name, span in self.spans.items() for pos in span}
        rows = []
        for pos, differ in enumerate(differs):
            shown = (visible(self.clean_tokens[pos]), visible(self.corrupted_tokens[pos]))
            rows.append((str(pos), *shown, "differs" if differ else "", *([field_at.get(pos, "")] * bool(field_at))))
        return Summary(
            title=f"Pair of {len(self.clean):,} tokens, {sum(differs)} of which differ",
            facts={
                "answer": None if self.answer is None else _say_answer(self.answer),
                "wrong": None if self.wrong is None else _say_answer(self.wrong),
            },
            listing=Listing(
                columns=("pos", "clean", "corrupted", "", "field") if field_at else ("pos", "clean", "corrupted", ""),
                rows=rows,
                what="positions",
                more="clean_tokens and corrupted_tokens have all",
                styles={(pos, column): sequential(0.25) for pos, one in enumerate(differs) if one for column in (1, 2)},
            ),
        )

    @classmethod
    def from_text(
        cls,
        model: HookedCausalLM,
        clean: str,
        corrupted: str,
        *,
        answer: Token | Sequence[Token] | None = None,
        wrong: Token | Sequence[Token] | None = None,
    ) -> "Pair":
        """A pair of two texts, and the answers to them.

        Raises:
            InputError: they have different numbers of tokens; the text shows both.
        """
        ids = [model.to_tokens(text, truncate=False)[0] for text in (clean, corrupted)]
        words = [tuple(str(token) for token in model.to_str_tokens(row)) for row in ids]
        if len(ids[0]) != len(ids[1]):
            raise InputError(
                f"the clean prompt has {len(ids[0])} tokens {list(words[0])}, the corrupted one {len(ids[1])} "
                f"{list(words[1])}; positions can be compared only if they have as many: replace words by words of as "
                "many tokens"
            )
        return cls(
            clean=ids[0],
            corrupted=ids[1],
            clean_tokens=words[0],
            corrupted_tokens=words[1],
            answer=answer,
            wrong=wrong,
        )

    @classmethod
    def from_template(
        cls,
        model: HookedCausalLM,
        template: str,
        clean: Fields,
        corrupted: Fields,
        *,
        answer: Token | Sequence[Token] | None = None,
        wrong: Token | Sequence[Token] | None = None,
    ) -> "Pair":
        """A pair of a template filled in twice.

        Args:
            model: whose tokenizer counts.
            template: text with `{fields}`.
            clean: the words of each field.
            corrupted: the same of the corrupted prompt.
            answer, wrong: the pair's answers.

        Raises:
            InputError: fields missing or too many, prompts or fields of different length, or a field whose words
                are not tokens of their own.
        """
        for name, fields in (("clean", clean), ("corrupted", corrupted)):
            wanted = {part for _, part, _, _ in string.Formatter().parse(template) if part is not None}
            if wanted != set(fields):
                raise InputError(f"the template has the fields {sorted(wanted)}, {name} fills {sorted(fields)}")
        pair = cls.from_text(model, template.format_map(clean), template.format_map(corrupted))
        spans = _find_spans(model, template, clean, pair.clean)
        others = _find_spans(model, template, corrupted, pair.corrupted)
        moved = [name for name in spans if spans[name] != others[name]]
        if moved:
            raise InputError(
                f"the fields {moved} take other positions in the corrupted prompt: {[others[name] for name in moved]} "
                f"instead of {[spans[name] for name in moved]}; fill them with words of as many tokens"
            )
        return replace(pair, spans=spans, answer=answer, wrong=wrong)

    @property
    def differing(self) -> list[int]:
        """The positions whose tokens differ."""
        different: list[int] = (self.clean != self.corrupted).nonzero()[:, 0].tolist()
        return different

    @property
    def labels(self) -> list[str]:
        """The tokens, `clean → corrupted` where they differ, for `SweepResult.plot(labels={"pos": ...})`."""
        return [
            one.strip() if one == other else f"{one.strip()} → {other.strip()}"
            for one, other in zip(self.clean_tokens, self.corrupted_tokens, strict=True)
        ]

    def position(self, name: str) -> int:
        """A named position: `"{field}.first"`, `"{field}.last"` (with or without braces), or `"end"`.

        Raises:
            InputError: no such name.
        """
        if name == "end":
            return len(self.clean) - 1
        field_name, _, which = name.replace("{", "").replace("}", "").rpartition(".")
        if field_name not in self.spans or which not in ("first", "last"):
            known = [f"{known}.{end}" for known in self.spans for end in ("first", "last")] + ["end"]
            raise InputError(f"no position is called {name!r}.{suggest_names(name, known)} There are {known}")
        return self.spans[field_name][0 if which == "first" else -1]

    def __str__(self) -> str:
        """Both prompts token by token, `clean -> corrupted` where they differ."""
        return " | ".join(
            one if one == other else f"{one} -> {other}"
            for one, other in zip(self.clean_tokens, self.corrupted_tokens, strict=True)
        )


@reads()
def stack_pairs(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs as a batch: clean ids, corrupted ids and the mask of real tokens, each `[pairs pos]`, padded on the right.

    Raises:
        InputError: no pair.
    """
    if not pairs:
        raise InputError("stack_pairs needs at least one pair")
    clean, corrupted, mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        for rows in (
            [pair.clean for pair in pairs],
            [pair.corrupted for pair in pairs],
            [torch.ones_like(pair.clean) for pair in pairs],
        )
    )
    return clean, corrupted, mask


def _find_spans(model: HookedCausalLM, template: str, fields: Fields, ids: Tensor) -> dict[str, range]:
    """The positions of each field, from how many tokens the text before it and up to its end has."""
    spans: dict[str, range] = {}
    text = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        text += literal
        if name is None:
            continue
        # The space before a word is part of its first token.
        first = _count_tokens(model, text.rstrip(" "), ids, name)
        text += fields[name]
        span = range(first, _count_tokens(model, text, ids, name))
        # A field that stands twice is named by its first place.
        spans.setdefault(name, span)
    return spans


def _count_tokens(model: HookedCausalLM, text: str, ids: Tensor, name: str) -> int:
    """How many of a prompt's tokens a beginning of its text takes."""
    if not text:
        # Nothing stands before the field but a BOS, where the tokenizer puts one.
        bos = getattr(model.tokenizer, "bos_token_id", None)
        return int(bos is not None and int(ids[0]) == bos)
    begun = model.to_tokens(text, truncate=False)[0]
    if not torch.equal(begun, ids[: len(begun)]):
        raise InputError(
            f"field {name!r}: its words are not tokens of their own (the text up to {text[-20:]!r} is split otherwise "
            "inside the whole prompt); set the field off by spaces"
        )
    return len(begun)


def _say_answer(answer: object) -> str:
    """An answer as it was given; of a tensor its numbers."""
    return repr(answer.tolist() if isinstance(answer, Tensor) else answer)
