"""Padding: what rows are filled up with, on which side, and which ids of a finished batch are filling."""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.tokens.tokenizer import Tokenizer, special_id

PaddingSide = Literal["left", "right"]


def padding_token_id(tokenizer: Tokenizer) -> int | None:
    """The id that `to_tokens` pads with: the pad token, else the EOS, else the BOS; None if it has none of them."""
    for name in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if (token_id := special_id(tokenizer, name)) is not None:
            return token_id
    return None


def resolve_padding_side(tokenizer: Tokenizer, padding_side: PaddingSide | None) -> PaddingSide:
    """The side asked for, or else the tokenizer's own.

    Raises:
        InputError: it is neither "left" nor "right".
    """
    side = padding_side if padding_side is not None else getattr(tokenizer, "padding_side", "right")
    for choice in get_args(PaddingSide):
        if side == choice:
            resolved: PaddingSide = choice
            return resolved
    raise InputError(f"padding_side is {side!r}; expected 'left' or 'right'")


def infer_attention_mask(
    tokens: Int[Tensor, "batch pos"],
    *,
    pad_token_id: int | None,
    bos_token_id: int | None,
    eos_token_id: int | None = None,
    padding_side: PaddingSide | None = None,
) -> Int[Tensor, "batch pos"] | None:
    """The attention mask of a batch of ids that came without one; None when nothing in it is padding.

    The rule:

    1. A run of the pad id at the start of a row is padding, and so is one at the end; with a
       `padding_side`, only the run on that side. Pad ids inside a row are tokens.
    2. Where the pad id is also the BOS id and **every** row starts with it, each row has a BOS: the run at
       the start keeps its last id. If some row starts with another token, no row was given a BOS.
    3. Where the pad id is also the EOS id and **every** row ends with it, likewise: the run at the end
       keeps its first id.
    4. A row of nothing but the pad id, where that is also the BOS or the EOS, keeps one id: the last if the padding
       is on the left, the first otherwise.
    5. A single row is never padded by `to_tokens`, so a run is taken for padding only at an end where the
       pad id has no other meaning: not at the start if it is the BOS, not at the end if it is the EOS.

    Rules 2 and 3 lean on the fact that the longest row of a padded batch has no padding. The masks that
    `to_tokens` makes come back exactly, except where the ids do not tell: the pad id is also the BOS or EOS
    and some prompts, but not all, spell it out at their start or end (or spell it several times); or a row
    is only the pad id and `padding_side` is None. Pass the mask in these cases.

    Padding on the right never changes the activations of the real positions before it (attention is
    causal); there the mask matters to losses and means only. Padding on the left changes everything.

    Args:
        tokens: the batch of ids.
        pad_token_id: the id of padding, see `padding_token_id`. None: nothing is padding.
        bos_token_id: the id that opens a sequence.
        eos_token_id: the id that closes a sequence.
        padding_side: the side on which the batch was padded. None: either.
    """
    if pad_token_id is None:
        return None
    is_pad = tokens == pad_token_id
    opens, closes = pad_token_id == bos_token_id, pad_token_id == eos_token_id
    if not bool(is_pad.any()) or (len(tokens) == 1 and (opens or closes) and bool(is_pad.all())):
        return None
    padding = _find_padding(is_pad, opens=opens, closes=closes, padding_side=padding_side)
    return (~padding).long() if bool(padding.any()) else None


def _find_padding(
    is_pad: Bool[Tensor, "batch pos"], *, opens: bool, closes: bool, padding_side: PaddingSide | None
) -> Bool[Tensor, "batch pos"]:
    """Apply the rule of `infer_attention_mask`; `opens` and `closes`: the pad id is also the BOS, the EOS."""
    single_row = len(is_pad) == 1
    padding = torch.zeros_like(is_pad)
    # A run shifted by one position spares the id at its inner end, the BOS or EOS.
    if padding_side != "right" and not (single_row and opens):
        run = is_pad.long().cumprod(dim=1).bool()
        kept = int(opens and bool(is_pad[:, 0].all()))
        padding[:, : is_pad.shape[1] - kept] |= run[:, kept:]
    if padding_side != "left" and not (single_row and closes):
        run = is_pad.long().flip(1).cumprod(dim=1).flip(1).bool()
        kept = int(closes and bool(is_pad[:, -1].all()))
        padding[:, kept:] |= run[:, : is_pad.shape[1] - kept]

    only_pad = is_pad.all(dim=1)
    if (opens or closes) and bool(only_pad.any()):
        others = padding[~only_pad]
        on_the_left = bool(others[:, 0].any()) and not bool(others[:, -1].any())
        if padding_side is not None:
            on_the_left = padding_side == "left"
        padding[only_pad] = True
        padding[only_pad, -1 if on_the_left else 0] = False
    return padding
