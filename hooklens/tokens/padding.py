"""Padding: what rows are filled up with, on which side, and which ids of a row are filling.

**The rule.** Text has the mask that its padding made. Ids with an attention mask have that one. Ids without a mask
are all tokens, except the padding of a *dedicated* pad id, one that the tokenizer uses for nothing else: runs of it at
the ends of a row are padding. No row's mask depends on another row.

A pad id that is also the BOS, the EOS or the unknown token (one token for all, in many checkpoints) is not dedicated:
ids do not tell whether it opens a sequence or fills it. `to_tokens(..., return_attention_mask=True)` gives the mask.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.errors import InputError, PaddingWarning, warn_caller
from hooklens.tokens.ids import has_values
from hooklens.tokens.tokenizer import Tokenizer, decode, special_id

PaddingSide = Literal["left", "right"]

_SHOWN = 10


def padding_token_id(tokenizer: Tokenizer) -> int | None:
    """The id that `to_tokens` pads with: the pad token, else the EOS, else the BOS; None if it has none of them."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if (token_id := special_id(tokenizer, name)) is not None:
            return token_id
    return None


def dedicated_pad_id(tokenizer: Tokenizer | None) -> int | None:
    """The pad id where it means nothing else: it is set, and neither the BOS, the EOS nor the unknown token."""
    if tokenizer is None:
        return None
    pad = special_id(tokenizer, "pad_token_id")
    others = [special_id(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "unk_token_id")]
    return None if pad in others else pad


def resolve_padding_side(tokenizer: Tokenizer, padding_side: PaddingSide | None) -> PaddingSide:
    """The side asked for, or else the tokenizer's own.

    Raises:
        InputError: it is neither "left" nor "right".
    """
    side = padding_side if padding_side is not None else getattr(tokenizer, "padding_side", "right")
    return check_padding_side(side)


def check_padding_side(side: object) -> PaddingSide:
    """A side that is one of the two.

    Raises:
        InputError: it is neither "left" nor "right".
    """
    for choice in get_args(PaddingSide):
        if isinstance(side, str) and side == choice:
            resolved: PaddingSide = choice
            return resolved
    raise InputError(f"padding_side is {side!r}; expected 'left' or 'right'")


def mask_of_ids(
    ids: Int[Tensor, "batch pos"], tokenizer: Tokenizer | None, *, padding_side: PaddingSide | None = None
) -> Int[Tensor, "batch pos"] | None:
    """The attention mask of ids that came without one, row by row; None where all of them are tokens.

    The one place that decides, by the rule in this module's description.

    Args:
        ids: on the CPU, best of all, since their values are looked at. While they are traced (`torch.compile`) the
            mask is a tensor also where it hides nothing.
        tokenizer: whose dedicated pad id counts. None: there is none.
        padding_side: the side that may hold padding. None: both.

    Raises:
        InputError: rows of nothing but the dedicated pad id.
    """
    side = None if padding_side is None else check_padding_side(padding_side)
    pad = dedicated_pad_id(tokenizer)
    if pad is None or ids.is_meta:
        return None
    is_pad = ids == pad
    hidden = torch.zeros_like(is_pad)
    if side != "right":
        hidden = hidden | is_pad.long().cumprod(1).bool()
    if side != "left":
        hidden = hidden | is_pad.long().flip(1).cumprod(1).flip(1).bool()
    if not has_values(ids):
        return (~hidden).long()
    if not bool(hidden.any()):
        return None
    empty = hidden.all(1).nonzero()[:, 0].tolist()
    if empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise InputError(
            f"rows {empty[:_SHOWN]}{more} hold nothing but the pad token (id {pad}), so they have no token; leave them "
            "out, or pass attention_mask where it is to count as a token"
        )
    return (~hidden).long()


def warn_of_likely_padding(ids: Int[Tensor, "batch pos"], tokenizer: Tokenizer | None) -> None:
    """Warn where ids look padded with a token that is not for padding alone; all of them run as tokens.

    They look so where some rows of a batch begin, or end, with two or more of the pad, EOS or BOS id, and others do
    not. Where there is a dedicated pad id, that one is padding and others are not.
    """
    if tokenizer is None or len(ids) < 2 or ids.shape[1] < 2 or dedicated_pad_id(tokenizer) is not None:
        return
    names = {"pad_token_id": "pad", "eos_token_id": "EOS", "bos_token_id": "BOS"}
    found: dict[int, list[str]] = {}
    for name, meaning in names.items():
        if (token := special_id(tokenizer, name)) is not None:
            found.setdefault(token, []).append(meaning)
    for token, meanings in found.items():
        for verb, ends in (("begin", ids[:, :2]), ("end", ids[:, -2:])):
            padded = (ends == token).all(1)
            rows = padded.nonzero()[:, 0].tolist()
            if rows and len(rows) < len(ids):
                more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
                warn_caller(
                    f"rows {rows[:_SHOWN]}{more} of the token ids {verb} with several {decode(tokenizer, [token])!r} "
                    f"(id {token}), as if padded; but that is the tokenizer's {' and '.join(meanings)} token, "
                    "so every id is run as a token. If they are padded, pass attention_mask: "
                    "to_tokens(..., return_attention_mask=True) gives it with the ids. If they are not, pass a mask "
                    "of ones",
                    PaddingWarning,
                )
                return
