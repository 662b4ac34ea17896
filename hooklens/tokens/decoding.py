"""Token ids back to text."""

from torch import Tensor

from hooklens.tokens.encoding import read_rows
from hooklens.tokens.ids import check_known_ids
from hooklens.tokens.inputs import Ids, OneNumber, Prompt, read_id_rows
from hooklens.tokens.tokenizer import Tokenizer, decode, decode_each


def to_string(tokenizer: Tokenizer, tokens: OneNumber | Tensor | Ids) -> str | list[str]:
    """Decode ids to text, special tokens included: a string for one row or one id, a list for `[batch pos]`.

    Raises:
        InputError: the tokens are no ids, or ids that the tokenizer does not have.
    """
    rows, is_batch = read_id_rows(tokens)
    check_known_ids(tokenizer, rows)
    texts = [decode(tokenizer, row) for row in rows]
    return texts if is_batch else texts[0]


def to_str_tokens(
    tokenizer: Tokenizer,
    input: Prompt,
    *,
    prepend_bos: bool | None = None,
) -> list[str] | list[list[str]]:
    """The tokens of a prompt as strings, each by itself; a list of such lists for several prompts.

    A token that begins with a space shows it, also where a decoder drops the space at the beginning of a text: with
    SentencePiece-like tokenizers the first token's string has the space that they put in front. There are as many
    strings as tokens: one that holds a part of a character shows as the replacement character U+FFFD. Prompts of a
    list are not padded.

    Args:
        tokenizer: encodes and decodes.
        input: a prompt, a list of prompts, or ids `[pos]` or `[batch pos]`.
        prepend_bos: the BOS rule for text; ids are taken as they are.

    Raises:
        InputError: an empty prompt, a BOS asked of a tokenizer that has none, or what is no ids of the tokenizer's.
    """
    rows, is_batch = read_rows(tokenizer, input, prepend_bos=prepend_bos)
    pieces = [decode_each(tokenizer, row) for row in rows]
    return pieces if is_batch else pieces[0]
