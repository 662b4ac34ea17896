"""Prompts as rows of ids without padding, and whether two tokenizers mean the same by them."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.tokens.batch import read_tokens
from hooklens.tokens.ids import knows_id
from hooklens.tokens.inputs import Prompt, is_text
from hooklens.tokens.tokenizer import Tokenizer, decode_each

_SHOWN = 5


def read_prompts(
    prompts: Prompt,
    tokenizer: Tokenizer | None,
    *,
    d_vocab: int,
    n_ctx: int,
    attention_mask: Tensor | None = None,
    prepend_bos: bool | None = None,
    device: torch.device | None = None,
) -> list[Int[Tensor, " _"]]:
    """The real tokens of each prompt.

    Args:
        prompts: text, a list of texts, or token ids.
        tokenizer: encodes text, and knows which id is padding.
        d_vocab: how many ids the model has.
        n_ctx: the longest prompt of text allowed, in tokens.
        attention_mask: real tokens (1) and padding (0) of padded ids.
        prepend_bos: the BOS rule for text.
        device: where the ids are to lie; None: where they were given.

    Raises:
        InputError: neither text nor ids, text without a tokenizer or with a mask, or a mask of another shape or
            without any token in a row.
    """
    if attention_mask is not None and is_text(prompts):
        raise InputError("attention_mask goes with token ids; the padding of text is known without it")
    ids, mask = read_tokens(
        prompts,
        tokenizer,
        d_vocab=d_vocab,
        n_ctx=n_ctx,
        attention_mask=attention_mask,
        prepend_bos=prepend_bos,
        what="a prompt",
    )
    ids = ids if device is None else ids.to(device)
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


def check_same_tokens(first: Tokenizer, second: Tokenizer, ids: Sequence[int], *, whose: tuple[str, str]) -> None:
    """Refuse ids that stand for one token in a tokenizer and for another one, or none, in a second.

    Args:
        first: a tokenizer.
        second: another one.
        ids: those that matter. Rows of an embedding may have none of either's.
        whose: how messages call the two.

    Raises:
        InputError: says of which ids the tokens differ.
    """
    listed = list(ids)
    pairs = zip(listed, _name_each(first, listed), _name_each(second, listed), strict=True)
    differing = [f"{token} is {one!r} and {other!r}" for token, one, other in pairs if one != other]
    if differing:
        more = f" and {len(differing) - _SHOWN} more" if len(differing) > _SHOWN else ""
        raise InputError(
            f"the tokenizers of {whose[0]} and {whose[1]} differ: id {', '.join(differing[:_SHOWN])}{more}; take "
            "models that read text alike"
        )


def _name_each(tokenizer: Tokenizer, ids: list[int]) -> list[str | None]:
    """The token of each id as the vocabulary writes it, which takes less time than its text; None where it has none."""
    known = [token for token in ids if knows_id(tokenizer, token)]
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    names = dict(zip(known, decode_each(tokenizer, known) if convert is None else convert(known), strict=True))
    return [names.get(token) for token in ids]
