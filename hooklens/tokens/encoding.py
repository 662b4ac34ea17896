"""Text to token ids: the BOS rule, padding and truncation.

"BOS" is the token that opens a sequence, "EOS" the one that closes it.

**The BOS rule** is one argument, `prepend_bos`:

- `None`: the tokenizer's own rule, with one correction: a tokenizer that adds a BOS does not add a second
  one to a text that is written with its BOS already (a rendered chat template, say).
- `True`: exactly one BOS at the front, whether the tokenizer, the text, both or neither bring it.
- `False`: none is added; one that the text itself spells out stays, being part of the text.

All three leave every other special token as the tokenizer is configured: where it appends an EOS, the
rows end in that EOS under `True` and `False` too. Text that something is to follow (`closed=False`: a prompt to
generate from, a prefix) leaves out what the tokenizer puts behind it. Text that goes on from tokens (`past`) has no
BOS at its front; `hooklens.tokens.continuation` says how it is encoded.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import read_flag
from hooklens.errors import InputError, warn_caller
from hooklens.tokens.continuation import closing_ids, continue_rows
from hooklens.tokens.ids import check_known_ids
from hooklens.tokens.inputs import is_text, read_id_rows, read_prepend_bos, read_texts
from hooklens.tokens.padding import PaddingSide, padding_token_id, resolve_padding_side
from hooklens.tokens.tokenizer import Tokenizer, decode, encode, special_id
from hooklens.tokens.unknown import warn_of_unknown

_SHOWN = 10


class TokenBatch(NamedTuple):
    """Prompts as one padded batch.

    Attributes:
        tokens: token ids.
        attention_mask: 1 where a token is part of its prompt, 0 where it is padding.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]


@overload
def to_tokens(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    *,
    prepend_bos: bool | None = ...,
    padding_side: PaddingSide | None = ...,
    truncate: bool = ...,
    n_ctx: int | None = ...,
    d_vocab: int | None = ...,
    return_attention_mask: Literal[False] = ...,
) -> Int[Tensor, "batch pos"]: ...


@overload
def to_tokens(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    *,
    prepend_bos: bool | None = ...,
    padding_side: PaddingSide | None = ...,
    truncate: bool = ...,
    n_ctx: int | None = ...,
    d_vocab: int | None = ...,
    return_attention_mask: bool,
) -> Int[Tensor, "batch pos"] | TokenBatch: ...


def to_tokens(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    *,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    truncate: bool = True,
    n_ctx: int | None = None,
    d_vocab: int | None = None,
    return_attention_mask: bool = False,
) -> Int[Tensor, "batch pos"] | TokenBatch:
    """Encode one prompt or a list of prompts as a padded batch, on the CPU.

    Words that the vocabulary lacks give one `UnknownTokenWarning`, prompts that are cut one `UserWarning`.

    Args:
        tokenizer: encodes the text; never changed.
        text: a prompt (a batch of one) or several.
        prepend_bos: the BOS rule, see the module's description.
        padding_side: where shorter prompts are padded. None: the tokenizer's own `padding_side`.
        truncate: cut prompts longer than `n_ctx` to their first `n_ctx` tokens (so the BOS stays and an
            EOS that the tokenizer appends goes), with one warning that counts what was cut.
        n_ctx: the longest prompt allowed, in tokens with BOS. None: any length.
        d_vocab: how many ids the model has. None: any id. Padding may lie beyond: a pad token that the tokenizer
            was given later, which no model runs.
        return_attention_mask: also give the mask, which ids do not always tell: `(ids, mask)`.

    Raises:
        InputError: no prompt at all, a prompt without a token, a BOS asked of a tokenizer that has none,
            an unknown padding side, a switch that is no bool, tokens beyond `d_vocab`, or a prompt over `n_ctx`
            tokens with `truncate=False`.
    """
    wants_mask = read_flag(return_attention_mask, what="return_attention_mask")
    batch = encode_batch(
        tokenizer,
        text,
        prepend_bos=prepend_bos,
        padding_side=padding_side,
        truncate=truncate,
        n_ctx=n_ctx,
        d_vocab=d_vocab,
        past=None,
        closed=True,
    )
    return batch if wants_mask else batch.tokens


def encode_batch(
    tokenizer: Tokenizer,
    text: str | Sequence[str],
    *,
    prepend_bos: bool | None,
    padding_side: PaddingSide | None,
    truncate: bool,
    n_ctx: int | None,
    d_vocab: int | None,
    past: Sequence[Sequence[int]] | None,
    closed: bool,
) -> TokenBatch:
    """The ids and the mask of prompts, see `to_tokens` and `hooklens.tokens.batch.read_tokens`."""
    texts = read_texts(text)
    side = resolve_padding_side(tokenizer, padding_side)
    cut = read_flag(truncate, what="truncate")
    rows = _encode_prompts(tokenizer, texts, prepend_bos=prepend_bos, past=past, closed=closed)
    if n_ctx is not None:
        rows = _fit_context(rows, n_ctx, truncate=cut)
    check_encoded(tokenizer, texts, rows, d_vocab=d_vocab)

    width = max(len(row) for row in rows)
    # Any id will do as filling, since the mask says what it is; 0 is an id that every embedding has.
    filling = padding_token_id(tokenizer) or 0
    tokens = torch.full((len(rows), width), filling, dtype=torch.long)
    attention_mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        tokens[index, place] = torch.tensor(row, dtype=torch.long)
        attention_mask[index, place] = 1
    return TokenBatch(tokens, attention_mask)


def check_encoded(
    tokenizer: Tokenizer, texts: Sequence[str], rows: Sequence[Sequence[int]], *, d_vocab: int | None
) -> None:
    """Warn of words in texts that the vocabulary lacks, and refuse tokens that the model lacks.

    Raises:
        InputError: tokens beyond `d_vocab`.
    """
    warn_of_unknown(tokenizer, texts, rows)
    if d_vocab is not None:
        _check_vocabulary(tokenizer, rows, d_vocab)


def read_rows(tokenizer: Tokenizer, input: Any, *, prepend_bos: bool | None) -> tuple[list[list[int]], bool]:
    """Rows of ids from text or ids that the tokenizer has, and whether the input was a batch."""
    prepend_bos = read_prepend_bos(prepend_bos)
    if is_text(input):
        return _encode_prompts(tokenizer, read_texts(input), prepend_bos=prepend_bos), not isinstance(input, str)
    rows, is_batch = read_id_rows(input, what="the input")
    check_known_ids(tokenizer, rows)
    return rows, is_batch


def _encode_prompts(
    tokenizer: Tokenizer,
    texts: list[str],
    *,
    prepend_bos: bool | None,
    past: Sequence[Sequence[int]] | None = None,
    closed: bool = True,
) -> list[list[int]]:
    """Encode under the BOS rule, rows of different lengths, and refuse prompts that have no token."""
    asked = read_prepend_bos(prepend_bos)
    # What the tokenizer puts behind a text, where that is not as it is to be.
    closing = closing_ids(tokenizer, texts) if closed != (past is None) else []
    if past is None:
        rows = _apply_bos_rule(tokenizer, texts, prepend_bos=asked)
        rows = [row[: len(row) - len(closing)] for row in rows]
    elif asked:
        raise InputError(
            "prepend_bos=True: the text goes on from tokens that stand before it, where no BOS belongs; leave "
            "prepend_bos out, or write the BOS into the text where it is to stand there"
        )
    else:
        rows = [[*row, *closing] if row else row for row in continue_rows(tokenizer, past, texts)]
    empty = [index for index, row in enumerate(rows) if not row]
    if empty:
        has_bos = special_id(tokenizer, "bos_token_id") is not None
        remedy = "give some text, or prepend_bos=True" if has_bos else "give some text"
        raise InputError(f"empty prompt: prompt {', '.join(map(str, empty))} of {len(texts)} has no token; {remedy}")
    return rows


def _check_vocabulary(tokenizer: Tokenizer, rows: Sequence[Sequence[int]], d_vocab: int) -> None:
    """Refuse tokens that the tokenizer has and the model has not."""
    outside = sorted({token for row in rows for token in row if token >= d_vocab})
    if not outside:
        return
    more = f" and {len(outside) - _SHOWN} more" if len(outside) > _SHOWN else ""
    shown = ", ".join(f"{decode(tokenizer, [token])!r} (id {token})" for token in outside[:_SHOWN])
    raise InputError(
        f"the text holds tokens that the model lacks: {shown}{more}; it has d_vocab={d_vocab}, ids 0 to {d_vocab - 1}. "
        "Leave them out (tokens added to a tokenizer have no embedding), or load the tokenizer of the model"
    )


def _apply_bos_rule(tokenizer: Tokenizer, texts: list[str], *, prepend_bos: bool | None) -> list[list[int]]:
    bos = special_id(tokenizer, "bos_token_id")
    rows = encode(tokenizer, texts, add_special_tokens=True)
    if bos is None:
        if prepend_bos:
            raise InputError(
                "prepend_bos=True: this tokenizer has no BOS token; set tokenizer.bos_token, or leave it None (so also "
                "model.default_prepend_bos, which is asked where a call does not say)"
            )
        return rows
    if prepend_bos is None and not any(row[:2] == [bos, bos] for row in rows):
        return rows

    tokenizer_adds = _adds_bos(tokenizer, bos, texts)
    # How many BOS tokens the text itself spells out at its start.
    spelled = [_count_leading(ids, bos) for ids in encode(tokenizer, texts, add_special_tokens=False)]
    without_added = [row[1:] if tokenizer_adds else row for row in rows]
    if prepend_bos is None:
        return [bare if count else row for row, bare, count in zip(rows, without_added, spelled, strict=True)]
    if prepend_bos:
        return [[bos, *bare[count:]] for bare, count in zip(without_added, spelled, strict=True)]
    return without_added


def _adds_bos(tokenizer: Tokenizer, bos: int, texts: list[str]) -> bool:
    """Whether the tokenizer puts a BOS in front of what it encodes.

    Found out by encoding, since tokenizers keep the rule in different places. A text that has a token other
    than the BOS decides: with BOS and EOS the same id, an empty one cannot tell a front from an end.
    """
    opens = False
    for probe in (*texts, "a", "0"):
        [bare] = encode(tokenizer, [probe], add_special_tokens=False)
        [full] = encode(tokenizer, [probe], add_special_tokens=True)
        opens = _count_leading(full, bos) > _count_leading(bare, bos)
        if any(token != bos for token in bare):
            break
    return opens


def _count_leading(ids: list[int], token: int) -> int:
    return next((index for index, found in enumerate(ids) if found != token), len(ids))


def _fit_context(rows: list[list[int]], n_ctx: int, *, truncate: bool) -> list[list[int]]:
    over = {index: len(row) for index, row in enumerate(rows) if len(row) > n_ctx}
    if not over:
        return rows
    lengths = ", ".join(f"prompt {index}: {length}" for index, length in list(over.items())[:_SHOWN])
    if not truncate:
        raise InputError(
            f"{len(over)} of {len(rows)} prompts are longer than n_ctx={n_ctx} tokens ({lengths}); "
            "shorten them, or pass truncate=True to cut them"
        )
    cut = sum(length - n_ctx for length in over.values())
    warn_caller(
        f"to_tokens cut {cut} tokens from the end of {len(over)} of {len(rows)} prompts "
        f"to fit n_ctx={n_ctx} ({lengths})"
    )
    return [row[:n_ctx] for row in rows]
