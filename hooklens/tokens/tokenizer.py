"""What HookLens asks of a tokenizer, which it never changes."""

from typing import Any, Protocol, runtime_checkable

from hooklens.arguments import refusal
from hooklens.errors import HookLensError, InputError

# What SentencePiece writes in the place of a space.
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


@runtime_checkable
class Tokenizer(Protocol):
    """What HookLens asks of a tokenizer; every `transformers` tokenizer has it.

    The ids `bos_token_id`, `eos_token_id`, `pad_token_id` and the string `padding_side` are read where
    they exist.
    """

    def __call__(self, text: Any, **options: Any) -> Any:
        """Encode texts; `["input_ids"]` of the result is a list of lists of ids."""
        ...

    def __len__(self) -> int:
        """How many tokens there are, added ones included."""
        ...

    def decode(self, token_ids: Any, **options: Any) -> Any:
        """Decode a list of ids to text."""
        ...


def read_tokenizer(given: object, *, what: str = "tokenizer", error: type[HookLensError] = InputError) -> Tokenizer:
    """A tokenizer that a caller gave.

    Raises:
        HookLensError: something else, the class of a tokenizer or its name included.
    """
    if isinstance(given, Tokenizer) and not isinstance(given, type):
        return given
    raise refusal(given, what, "a transformers tokenizer (AutoTokenizer.from_pretrained(name))", error)


def special_id(tokenizer: Tokenizer, name: str) -> int | None:
    """The id that a tokenizer has under a name such as `bos_token_id`; None where it has none."""
    token_id: int | None = getattr(tokenizer, name, None)
    return token_id


def encode(tokenizer: Tokenizer, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Rows of ids as the tokenizer gives them, neither padded nor cut."""
    encoding = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,
    )
    return [list(ids) for ids in encoding["input_ids"]]


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of a row of ids, special tokens included."""
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def decode_each(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each id, a space at its beginning included."""
    strings = {token: _decode_one(tokenizer, token) for token in set(ids)}
    return [strings[token] for token in ids]


def _decode_one(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token as it is inside a row.

    SentencePiece-like decoders drop a space of the first token that they decode, without which a token alone would
    read as another one. Behind itself the token has it.
    """
    alone = decode(tokenizer, [token])
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    piece = None if convert is None else convert(token)
    if not isinstance(piece, str) or _SPACE not in piece or _SPACE in alone:
        return alone
    return decode(tokenizer, [token, token])[len(alone) :]


def added_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The tokens that a tokenizer finds in a text before it splits the rest: special ones and other added ones."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")
    special = [special_id(tokenizer, name) for name in names]
    more = (*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ()))
    return frozenset(token for token in (*special, *more) if token is not None)
