"""One token: its id, its string, and where it stands in a prompt."""

from typing import Any, Literal, get_args

from torch import Tensor

from hooklens.errors import InputError, join_names
from hooklens.tokens.continuation import TextBefore, encode_behind
from hooklens.tokens.encoding import read_rows
from hooklens.tokens.ids import check_known_ids, read_token_id
from hooklens.tokens.inputs import OneNumber, Prompt
from hooklens.tokens.tokenizer import Tokenizer, decode_each, encode
from hooklens.tokens.unknown import unknown_pieces

PositionMode = Literal["first", "last"]

# What a text may stand behind: signs that seldom make one token with it.
_BEFORE = ("\n", ":", "a")


def to_single_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is exactly one token inside a row; nothing is added to the text, no space and no BOS.

    SentencePiece-like tokenizers put a space in front of a text that they encode alone; here `"word"` is the token
    without a space and `" word"` the one with it, as with every other tokenizer.

    Raises:
        InputError: the text is no token or several (the message names the pieces), or a word that the vocabulary
            lacks, for which the unknown token would stand.
    """
    if not isinstance(text, str):
        raise InputError(f"to_single_token takes a text, got {text!r} ({type(text).__name__})")
    token = _find_single(tokenizer, text)
    if token is not None:
        if unknown_pieces(tokenizer, [text]):
            raise InputError(
                f"{text!r} is not in the tokenizer's vocabulary: it becomes the unknown token "
                f"{getattr(tokenizer, 'unk_token', None)!r} (id {token}), as every word does that the vocabulary "
                "lacks; use a word that it has"
            )
        return token
    [ids] = encode(tokenizer, [text], add_special_tokens=False)
    pieces = join_names(decode_each(tokenizer, ids))
    found = f"{len(ids)} tokens: {pieces}" if len(ids) > 1 else f"not the token {pieces}" if ids else "no token at all"
    bare = text.strip()
    variants = [variant for variant in (f" {bare}", bare) if bare and variant != text]
    single = [
        repr(variant)
        for variant in variants
        if _find_single(tokenizer, variant) is not None and not unknown_pieces(tokenizer, [variant])
    ]
    hint = f" {' or '.join(single)} is one (mind the space)." if single else ""
    raise InputError(f"{text!r} is {found}; expected a text that is a single token.{hint}")


def _find_single(tokenizer: Tokenizer, text: str) -> int | None:
    """The token that a text is inside a row; None where it is several, or none."""
    [alone] = encode(tokenizer, [text], add_special_tokens=False)
    rows = [alone]
    if text.startswith(" "):
        # A tokenizer that puts a space in front makes two of this one.
        rows += encode(tokenizer, [text[1:]], add_special_tokens=False)
    for sign in _BEFORE:
        [encoded] = encode(tokenizer, [sign], add_special_tokens=False)
        rows += [row for row in encode_behind(tokenizer, TextBefore([], sign, encoded), [text]) if row is not None]
    for row in rows:
        if len(row) == 1 and decode_each(tokenizer, row) == [text]:
            return row[0]
    # Tokenizers that change texts (case, accents, spaces dropped) have no token that reads as this one.
    is_spaced = decode_each(tokenizer, alone) == [f" {text}"]
    return alone[0] if len(alone) == 1 and not is_spaced else None


def to_single_str_token(tokenizer: Tokenizer, token: OneNumber | Tensor) -> str:
    """The string of one token id, a space at its beginning included.

    Raises:
        InputError: it is no integer, or the tokenizer has no such id.
    """
    return decode_each(tokenizer, [_read_known_id(tokenizer, token, what="to_single_str_token: the token")])[0]


def _read_known_id(tokenizer: Tokenizer, token: Any, *, what: str) -> int:
    known = read_token_id(token, what=what)
    check_known_ids(tokenizer, [[known]])
    return known


def get_token_position(
    tokenizer: Tokenizer,
    single_token: str | OneNumber | Tensor,
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
