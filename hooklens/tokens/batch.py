"""The token ids and the mask that a call runs, from whatever it was given."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.tokens.encoding import encode_batch
from hooklens.tokens.ids import check_token_ids, has_values
from hooklens.tokens.inputs import TokenIds, read_input, read_prepend_bos
from hooklens.tokens.padding import PaddingSide, check_padding_side, mask_of_ids, warn_of_likely_padding
from hooklens.tokens.tokenizer import Tokenizer, special_id


class CallTokens(NamedTuple):
    """What a call runs.

    Attributes:
        ids: int64, inside the vocabulary, padding included; where they were given (text and lists: on the CPU).
        attention_mask: 1 for tokens and 0 for padding. None: all are tokens. It lies on the CPU unless a mask on
            another device was given, so what it says is known without waiting for an accelerator. A mask that was
            given is as it was: its shape and values are for the caller to check.
    """

    ids: Int[Tensor, "batch pos"]
    attention_mask: Tensor | None


def read_tokens(
    input: object,
    tokenizer: Tokenizer | None,
    *,
    d_vocab: int,
    n_ctx: int | None = None,
    attention_mask: object = None,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    past: Sequence[Sequence[int]] | None = None,
    closed: bool = True,
    what: str = "the input",
    hint: str = "",
) -> CallTokens:
    """The ids and the mask of an input: text, or token ids in any form (see `hooklens.tokens.inputs`).

    The rule for masks is in `hooklens.tokens.padding`; ids that look padded and cannot be told from tokens give a
    `PaddingWarning`.

    Args:
        input: what a caller gave.
        tokenizer: encodes text, and knows which id is padding. None: ids are all tokens.
        d_vocab: how many ids the model has.
        n_ctx: the longest prompt of text allowed, in tokens.
        attention_mask: 1 for tokens and 0 for padding, for ids; for text it may hide more than the padding.
        prepend_bos: the BOS rule for text; ids are taken as they are.
        padding_side: where text is padded (None: the tokenizer's own), and where ids may be (None: both ends).
        past: for text that goes on: the tokens before each text, or one row of them before all texts (see
            `hooklens.tokens.continuation`). None: a sequence begins.
        closed: False leaves out what the tokenizer puts behind a text, since something is to follow.
        what: what messages call the input.
        hint: ends the message about a kind that is no input.

    Raises:
        InputError: no input, text without a tokenizer, ids or tokens outside the vocabulary, rows of nothing but
            padding, a mask that is none, or text that does not go on from `past`.
    """
    read_prepend_bos(prepend_bos)
    if padding_side is not None:
        check_padding_side(padding_side)
    given = read_input(input, what=what, hint=hint)
    mask = _read_mask(attention_mask)
    if isinstance(given, TokenIds):
        ids, mask = _read_ids(given.ids, tokenizer, mask, d_vocab=d_vocab, padding_side=padding_side)
    else:
        if tokenizer is None:
            raise InputError(
                "text was given, but the model has no tokenizer; pass token ids, or load with tokenizer=..."
            )
        batch = encode_batch(
            tokenizer,
            given.texts,
            prepend_bos=prepend_bos,
            padding_side=padding_side,
            truncate=False,
            n_ctx=n_ctx,
            d_vocab=d_vocab,
            past=past,
            closed=closed,
        )
        if mask is not None:
            _refuse_shown_padding(mask, batch.attention_mask)
        mask = batch.attention_mask if mask is None else mask
        ids = _fill_hidden(batch.tokens, mask, tokenizer, d_vocab)
    return CallTokens(ids, None if mask is not None and _hides_nothing(mask, ids) else mask)


def _read_ids(
    ids: Int[Tensor, "batch pos"],
    tokenizer: Tokenizer | None,
    mask: Tensor | None,
    *,
    d_vocab: int,
    padding_side: PaddingSide | None,
) -> tuple[Int[Tensor, "batch pos"], Tensor | None]:
    """Ids that are known to be in the vocabulary, and their mask."""
    if not has_values(ids):
        return ids, mask_of_ids(ids, tokenizer, padding_side=padding_side) if mask is None else mask
    # One transfer where they lie on an accelerator; everything else is looked up here.
    host = ids.cpu()
    if mask is None:
        mask = mask_of_ids(host, tokenizer, padding_side=padding_side)
        warn_of_likely_padding(host, tokenizer)
    if mask is not None and mask.ndim == 1:
        mask = mask[None]
    filled = _fill_hidden(host, mask, tokenizer, d_vocab)
    check_token_ids(filled, d_vocab)
    return (ids if filled is host else filled.to(ids.device)), mask


def _fill_hidden(
    ids: Int[Tensor, "batch pos"], mask: Tensor | None, tokenizer: Tokenizer | None, d_vocab: int
) -> Int[Tensor, "batch pos"]:
    """The ids with 0 in the place of hidden pad ids that the embedding lacks."""
    pad = None if tokenizer is None else special_id(tokenizer, "pad_token_id")
    if mask is None or pad is None or pad < d_vocab or mask.shape != ids.shape:
        return ids
    return ids.masked_fill((ids == pad) & (mask == 0).to(ids.device), 0)


def _read_mask(mask: object) -> Tensor | None:
    """A mask as a tensor; its shape and values are checked where it is used."""
    if mask is None or isinstance(mask, Tensor):
        return mask
    try:
        return torch.as_tensor(mask)
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"attention_mask is a {type(mask).__name__}; expected a tensor [batch pos] of 1 (token) and 0 (padding)"
        ) from None


def _refuse_shown_padding(mask: Tensor, text_mask: Tensor) -> None:
    """Refuse a mask that makes tokens of the padding between texts."""
    shown = mask.cpu()[None] if mask.ndim == 1 else mask.cpu()
    if shown.shape == text_mask.shape and bool(((shown != 0) & (text_mask == 0)).any()):
        raise InputError(
            "attention_mask counts padding of the texts as tokens; leave it out (the padding of text is known without "
            "it), or take it from to_tokens(..., return_attention_mask=True) and hide more"
        )


def _hides_nothing(mask: Tensor, ids: Tensor) -> bool:
    """Whether a mask is known to be all ones without waiting for an accelerator."""
    if mask.device.type != "cpu" or not has_values(mask) or mask.shape != ids.shape:
        return False
    return bool((mask == 1).all())
