"""Token ids back to text."""

from collections.abc import Sequence

from torch import Tensor

from hooklens.tokens.encoding import read_rows
from hooklens.tokens.ids import read_ids
from hooklens.tokens.tokenizer import Tokenizer, decode, decode_each


def to_string(tokenizer: Tokenizer, tokens: int | Tensor | Sequence[int] | Sequence[Sequence[int]]) -> str | list[str]:
    """Decode ids to text, special tokens included: a string for one row or one id, a list for `[batch pos]`.

    Raises:
        InputError: the tokens are no ids.
    """
    rows, is_batch = read_ids(tokens)
    texts = [decode(tokenizer, row) for row in rows]
    return texts if is_batch else texts[0]


def to_str_tokens(
    tokenizer: Tokenizer,
    input: str | Tensor | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
    *,
    prepend_bos: bool | None = None,
) -> list[str] | list[list[str]]:
    """The tokens of a prompt as strings, each decoded alone; a list of such lists for several prompts.

    There are as many strings as tokens: one that holds a part of a character shows as the replacement
    character U+FFFD. Prompts of a list are not padded.

    Args:
        tokenizer: encodes and decodes.
        input: a prompt, a list of prompts, or ids `[pos]` or `[batch pos]`.
        prepend_bos: the BOS rule for text; ids are taken as they are.

    Raises:
        InputError: an empty prompt, a BOS asked of a tokenizer that has none, or what is no ids.
    """
    rows, is_batch = read_rows(tokenizer, input, prepend_bos=prepend_bos)
    pieces = [decode_each(tokenizer, row) for row in rows]
    return pieces if is_batch else pieces[0]
