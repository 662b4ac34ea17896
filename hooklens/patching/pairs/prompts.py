"""Pairs of prompts: a clean one, and a corrupted one that differs in what is to be located.

Patching carries activations from one run into the other position by position, so the two prompts must have as
many tokens, and positions must mean the same in both (Zhang and Nanda 2023, "Towards Best Practices of
Activation Patching"). Replace a word by another of the same length rather than dropping it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens import tokens as tokenization
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError

Prompt = tokenization.Prompt


@dataclass(frozen=True, kw_only=True)
class PromptPairs:
    """Pairs of prompts as token ids, padded on the right, so that columns are positions.

    Attributes:
        clean: ids `[pairs pos]`.
        corrupted: ids `[pairs pos]`.
        lengths: real tokens of each pair.
    """

    clean: Int[Tensor, "pairs pos"]
    corrupted: Int[Tensor, "pairs pos"]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_padded(self) -> bool:
        """Whether pairs differ in length."""
        return len(set(self.lengths)) > 1


def read_pairs(
    model: HookedCausalLM, clean: Prompt, corrupted: Prompt, attention_mask: Int[Tensor, "batch pos"] | None = None
) -> PromptPairs:
    """Encode both prompts of one or several pairs, and check that they go together.

    Args:
        model: whose tokenizer and vocabulary count.
        clean: text, a list of texts, or ids.
        corrupted: the same, one for each clean prompt.
        attention_mask: real tokens (1) and padding (0) of both, where ids are padded. None: as in a call of the
            model, see `hooklens.tokens.padding`.

    Raises:
        InputError: another number of prompts, or pairs of prompts of different length; all of them are named.
    """
    clean_rows = read_prompts(model, clean, attention_mask)
    corrupted_rows = read_prompts(model, corrupted, attention_mask)
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
    if attention_mask is not None and tokenization.is_text(prompt):
        raise InputError("attention_mask goes with token ids; the padding of text is known without it")
    ids, mask = tokenization.read_tokens(
        prompt,
        model.tokenizer,
        d_vocab=model.cfg.d_vocab,
        n_ctx=model.cfg.n_ctx,
        attention_mask=attention_mask,
        what="a prompt",
        hint=" (of a Pair: pair.clean and pair.corrupted)",
    )
    ids = ids.to(model.device)
    if mask is None:
        return list(ids)
    if mask.shape != ids.shape:
        raise InputError(f"attention_mask has shape {list(mask.shape)}; expected that of the ids, {list(ids.shape)}")
    empty = (mask == 0).all(1).nonzero()[:, 0].tolist()
    if empty:
        raise InputError(f"attention_mask hides every token of rows {empty}; leave empty rows out of the batch")
    # A mask on the CPU says where the tokens are without waiting for an accelerator.
    real = mask.bool() if mask.device.type == "cpu" else mask.bool().to(ids.device)
    return [row[tokens] for row, tokens in zip(ids, real, strict=True)]


def _pad_right(rows: Sequence[Tensor]) -> Int[Tensor, "pairs pos"]:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
