"""When a row ends: an end token, a stop string, a criterion of the caller's, or the length."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hooklens.errors import InputError
from hooklens.generation.choosing.processors import RowIds
from hooklens.generation.model import GeneratingModel
from hooklens.generation.options import GenerationOptions, StopFunction
from hooklens.generation.prompts import Prompts, end_token_ids
from hooklens.generation.text import StopTexts, find_context

FinishReason = Literal["end_token", "stop_string", "criterion", "length", "interrupted"]


class StopRules:
    """The rules by which rows of one generation end.

    Args:
        model: knows its end tokens.
        options: say when rows end.
        prompts: what the new tokens follow.

    Raises:
        InputError: stop strings without a tokenizer, or end tokens outside the vocabulary.
    """

    def __init__(self, model: GeneratingModel, options: GenerationOptions, prompts: Prompts) -> None:
        self._end_tokens = frozenset(end_token_ids(model, options))
        self._criteria: tuple[StopFunction, ...] = tuple(options.stopping_criteria)
        self._max_new_tokens = options.max_new_tokens
        self._stop_texts: StopTexts | None = None
        if options.stop_texts:
            if model.tokenizer is None:
                raise InputError(
                    "generate: stop_strings needs a tokenizer and the model has none; load with tokenizer=..., or use "
                    "eos_token_id or stopping_criteria"
                )
            self._stop_texts = StopTexts(model.tokenizer, options.stop_texts)
            self._before = [
                find_context(model.tokenizer, prompts.sequence(prompt))
                for prompt in range(len(prompts.lengths))
                for _ in range(options.num_return_sequences)
            ]

    @property
    def reads_ids(self) -> bool:
        """Whether `ask_criteria` has something to ask."""
        return bool(self._criteria)

    def ask_criteria(self, ids: RowIds, scores: Tensor) -> list[bool]:
        """For each row, whether a criterion of the caller's ends it; rows are shown without padding.

        Args:
            ids: tokens of the rows, the newest included.
            scores: `[batch d_vocab]`, the processed logits that the newest token was chosen by.
        """
        ended = torch.zeros(len(scores), dtype=torch.bool)
        for rows, group_ids in ids.groups():
            group_scores = scores if rows is None else scores[rows]
            for criterion in self._criteria:
                verdict = torch.as_tensor(criterion(group_ids, group_scores)).bool().cpu().expand(len(group_ids))
                if rows is None:
                    ended |= verdict
                else:
                    ended[rows.cpu()] |= verdict
        return ended.tolist()

    def reason(self, row: int, new_ids: Sequence[int], *, criterion: bool) -> FinishReason | None:
        """Why a row ends with its newest token; None if it goes on.

        Args:
            row: which row of the result.
            new_ids: its new tokens.
            criterion: whether a criterion of the caller's ends it.
        """
        if new_ids[-1] in self._end_tokens:
            return "end_token"
        if self._stop_texts is not None and self._stop_texts.occurs_in(new_ids, before=self._before[row]):
            return "stop_string"
        if criterion:
            return "criterion"
        return "length" if len(new_ids) >= self._max_new_tokens else None
