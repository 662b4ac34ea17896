"""What compared models read: the same tokens, of which some positions are compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.choice import Index, resolve_choice
from hooklens.tokens import Prompt, Tokenizer

_SHOWN = 5


class PromptBatch(NamedTuple):
    """Some prompts, padded on the right.

    Attributes:
        ids: the tokens.
        mask: 1 for tokens and 0 for padding; None: nothing is padding.
        rows: for each token compared the row that it stands in.
        columns: its column.
    """

    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"] | None
    rows: Int[Tensor, " token"]
    columns: Int[Tensor, " token"]


@dataclass(frozen=True, kw_only=True)
class ComparedPrompts:
    """Prompts without padding.

    Attributes:
        rows: the tokens of each.
        places: the positions of each that are compared.
        texts: the prompts, where they were given as text, so that other tokenizers can be held against the first.
        tokenizer: encoded them.
        name: whose tokenizer it was.
    """

    rows: tuple[Int[Tensor, " _"], ...]
    places: tuple[list[int], ...]
    texts: Prompt | None
    tokenizer: Tokenizer | None
    name: str

    @classmethod
    def read(
        cls, name: str, model: HookedCausalLM, prompts: Prompt, *, pos: Index, attention_mask: Tensor | None
    ) -> "ComparedPrompts":
        """The prompts as the first of the models reads them.

        Raises:
            InputError: no prompts, a position that one of them does not have, or none left to compare.
        """
        rows = _encode(model, prompts, attention_mask)
        places = tuple(resolve_choice(pos, len(row), what="pos", noun="tokens of a prompt") for row in rows)
        if not any(places):
            raise InputError("pos selects no token of any prompt; expected at least one to compare")
        texts = prompts if tokenization.is_text(prompts) else None
        return cls(rows=tuple(rows), places=places, texts=texts, tokenizer=model.tokenizer, name=name)

    @property
    def n_tokens(self) -> int:
        """How many tokens are compared."""
        return sum(map(len, self.places))

    def check_reader(self, name: str, model: HookedCausalLM) -> None:
        """Refuse a model that reads the prompts as other tokens, or has no such tokens.

        Raises:
            InputError: says which prompt or token differs.
        """
        for row in self.rows:
            tokenization.check_range(row, model.cfg.d_vocab)
        if self.texts is None:
            return
        advice = "give token ids to compare the models on the same tokens all the same"
        if model.tokenizer is None:
            raise InputError(f"model {name!r} has no tokenizer to read the prompts with; {advice}")
        assert self.tokenizer is not None
        others = _encode(model, self.texts, None)
        for number, (own, other) in enumerate(zip(self.rows, others, strict=True)):
            if own.tolist() != other.tolist():
                raise InputError(
                    f"models {self.name!r} and {name!r} read prompt {number} as different tokens, "
                    f"{_show(own)} and {_show(other)}; {advice}"
                )
        # Tokens that were added behind the vocabulary of one of the two stand in no prompt.
        shared = range(min(model.cfg.d_vocab, len(self.tokenizer), len(model.tokenizer)))
        whose = (repr(self.name), repr(name))
        try:
            tokenization.check_same_tokens(self.tokenizer, model.tokenizer, shared, whose=whose)
        except InputError as error:
            raise InputError(f"{error}, or {advice}") from error

    def batches(self, size: int) -> Iterator[PromptBatch]:
        """The prompts in their order, so many at a time."""
        for first in range(0, len(self.rows), size):
            rows, places = self.rows[first : first + size], self.places[first : first + size]
            ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
            lengths = torch.tensor([len(row) for row in rows])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            yield PromptBatch(
                ids,
                None if bool(mask.all()) else mask,
                torch.tensor([row for row, own in enumerate(places) for _ in own], dtype=torch.long),
                torch.tensor([column for own in places for column in own], dtype=torch.long),
            )


def _encode(model: HookedCausalLM, prompts: Prompt, attention_mask: Tensor | None) -> list[Int[Tensor, " _"]]:
    return tokenization.read_prompts(
        prompts,
        model.tokenizer,
        d_vocab=model.cfg.d_vocab,
        n_ctx=model.cfg.n_ctx,
        attention_mask=attention_mask,
        prepend_bos=model.bos_rule(),
        device=torch.device("cpu"),
    )


def _show(ids: Sequence[int] | Tensor) -> str:
    numbers = [int(one) for one in ids[:_SHOWN]]
    return f"{numbers}{f' and {len(ids) - _SHOWN} more' if len(ids) > _SHOWN else ''}"
