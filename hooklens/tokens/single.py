"""One token: its id, its string, and where it stands in a prompt."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import Tensor

from hooklens.errors import InputError, join_names
from hooklens.tokens.encoding import read_rows
from hooklens.tokens.tokenizer import Tokenizer, decode, decode_each, encode

PositionMode = Literal["first", "last"]


def to_single_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of a text that is exactly one token; nothing is added to the text, no space and no BOS.

    Raises:
        InputError: the text is no token or several; the message names the pieces.
    """
    [ids] = encode(tokenizer, [text], add_special_tokens=False)
    if len(ids) == 1:
        return ids[0]
    found = f"{len(ids)} tokens: {join_names(decode_each(tokenizer, ids))}" if ids else "no token at all"
    bare = text.strip()
    variants = [variant for variant in (f" {bare}", bare) if bare and variant != text]
    lengths = [len(ids) for ids in encode(tokenizer, variants, add_special_tokens=False)] if variants else []
    single = [repr(variant) for variant, length in zip(variants, lengths, strict=True) if length == 1]
    hint = f" {' or '.join(single)} is one (mind the space)." if single else ""
    raise InputError(f"{text!r} is {found}; expected a text that is a single token.{hint}")


def to_single_str_token(tokenizer: Tokenizer, token: int) -> str:
    """The string of one token id.

    Raises:
        InputError: the tokenizer has no such id.
    """
    if not 0 <= token < len(tokenizer):
        raise InputError(
            f"token id {token} is not in the tokenizer's vocabulary; its ids are 0 to {len(tokenizer) - 1}"
        )
    return decode(tokenizer, [token])


def get_token_position(
    tokenizer: Tokenizer,
    single_token: str | int,
    input: str | Tensor | Sequence[int],
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
        InputError: the token is not in the prompt, the text is not one token, or the input is several rows.
    """
    if mode not in get_args(PositionMode):
        raise InputError(f"get_token_position: mode is {mode!r}; expected 'first' or 'last'")
    rows, _ = read_rows(tokenizer, input, prepend_bos=prepend_bos)
    if len(rows) != 1:
        raise InputError(f"get_token_position: the input has {len(rows)} rows; expected a single prompt")
    [ids] = rows
    token = to_single_token(tokenizer, single_token) if isinstance(single_token, str) else single_token
    if token not in ids:
        pieces = join_names(decode_each(tokenizer, ids))
        wanted = f"{single_token!r} (id {token})" if isinstance(single_token, str) else f"id {token}"
        raise InputError(f"get_token_position: token {wanted} is not in the prompt, whose tokens are {pieces}")
    return ids.index(token) if mode == "first" else len(ids) - 1 - ids[::-1].index(token)
