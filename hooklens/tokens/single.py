"""One token: its id, its string, and where it stands in a prompt."""

from typing import Any, Literal, get_args

import numpy as np
from torch import Tensor

from hooklens.errors import InputError, join_names
from hooklens.tokens.encoding import read_rows
from hooklens.tokens.ids import check_known_ids, read_token_id
from hooklens.tokens.inputs import Prompt
from hooklens.tokens.tokenizer import Tokenizer, decode, decode_each, encode
from hooklens.tokens.unknown import unknown_pieces

PositionMode = Literal["first", "last"]


def to_single_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is exactly one token; nothing is added to the text, no space and no BOS.

    Raises:
        InputError: the text is no token or several (the message names the pieces), or a word that the vocabulary
            lacks, for which the unknown token would stand.
    """
    if not isinstance(text, str):
        raise InputError(f"to_single_token takes a text, got {text!r} ({type(text).__name__})")
    [ids] = encode(tokenizer, [text], add_special_tokens=False)
    if len(ids) == 1:
        if unknown_pieces(tokenizer, [text]):
            raise InputError(
                f"{text!r} is not in the tokenizer's vocabulary: it becomes the unknown token "
                f"{getattr(tokenizer, 'unk_token', None)!r} (id {ids[0]}), as every word does that the vocabulary "
                "lacks; use a word that it has"
            )
        return ids[0]
    found = f"{len(ids)} tokens: {join_names(decode_each(tokenizer, ids))}" if ids else "no token at all"
    bare = text.strip()
    variants = [variant for variant in (f" {bare}", bare) if bare and variant != text]
    lengths = [len(ids) for ids in encode(tokenizer, variants, add_special_tokens=False)] if variants else []
    single = [
        repr(variant)
        for variant, length in zip(variants, lengths, strict=True)
        if length == 1 and not unknown_pieces(tokenizer, [variant])
    ]
    hint = f" {' or '.join(single)} is one (mind the space)." if single else ""
    raise InputError(f"{text!r} is {found}; expected a text that is a single token.{hint}")


def to_single_str_token(tokenizer: Tokenizer, token: int | np.integer[Any] | Tensor) -> str:
    """The string of one token id.

    Raises:
        InputError: it is no integer, or the tokenizer has no such id.
    """
    return decode(tokenizer, [_read_known_id(tokenizer, token, what="to_single_str_token: the token")])


def _read_known_id(tokenizer: Tokenizer, token: Any, *, what: str) -> int:
    known = read_token_id(token, what=what)
    check_known_ids(tokenizer, [[known]])
    return known


def get_token_position(
    tokenizer: Tokenizer,
    single_token: str | int | np.integer[Any] | Tensor,
    input: Prompt,
    *,
    mode: PositionMode = "first",
    prepend_bos: bool | None = None,
) -> int:
    """The position of a token in a prompt, counted from 0 with the BOS where there is one.

    Args:
        tokenizer: encodes and decodes.
        single_token: the token, as an id or as a text that is a single token.
        input: a prompt, or ids `[pos]` or `[1 pos]`.
        mode: which occurrence, `"first"` or `"last"`.
        prepend_bos: the BOS rule for text; ids are taken as they are.

    Raises:
        InputError: the token is not in the prompt, the text is not one token of the vocabulary, the id is none of the
            tokenizer's, or the input is several rows.
    """
    if not isinstance(mode, str) or mode not in get_args(PositionMode):
        raise InputError(f"get_token_position: mode is {mode!r}; expected 'first' or 'last'")
    rows, _ = read_rows(tokenizer, input, prepend_bos=prepend_bos)
    if len(rows) != 1:
        raise InputError(f"get_token_position: the input has {len(rows)} rows; expected a single prompt")
    [ids] = rows
    if isinstance(single_token, str):
        token = to_single_token(tokenizer, single_token)
    else:
        token = _read_known_id(tokenizer, single_token, what="get_token_position: the token")
    if token not in ids:
        pieces = join_names(decode_each(tokenizer, ids))
        wanted = f"{single_token!r} (id {token})" if isinstance(single_token, str) else f"id {token}"
        raise InputError(f"get_token_position: token {wanted} is not in the prompt, whose tokens are {pieces}")
    return ids.index(token) if mode == "first" else len(ids) - 1 - ids[::-1].index(token)
