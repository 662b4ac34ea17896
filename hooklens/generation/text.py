"""Text of generated tokens: whole, in pieces as tokens come, and the search for stop strings."""

import itertools
from collections.abc import Sequence

from hooklens.tokens import Tokenizer

# A character is at most four bytes, so at most four tokens hold one.
_TOKENS_PER_CHARACTER = 4
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def decode_plain(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def decode_behind(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> str:
    """The text that ids add to that of the ids before them, without special tokens.

    A decoder may drop the space that begins what it decodes, so ids alone do not tell it. Where the ids before end
    inside a character, the whole character is added.
    """
    start, whole = decode_plain(tokenizer, before), decode_plain(tokenizer, [*before, *ids])
    if whole.startswith(start):
        return whole[len(start) :]
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(start, whole, strict=False))
    return whole[sum(1 for _ in same) :]


def find_context(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """As many of the last ids as have some text; all of them where they have none."""
    n_ids = 2 * _TOKENS_PER_CHARACTER
    while n_ids < len(ids) and not decode_plain(tokenizer, ids[-n_ids:]):
        n_ids *= 2
    return list(ids[-n_ids:])


class TextPieces:
    """Turns a growing row of tokens into pieces of text whose sum is the new text.

    A token is decoded together with tokens before it that have some text, since what it reads as may depend on them;
    one that ends inside a character gives an empty piece, and the character comes with a later one.

    Args:
        tokenizer: decodes.
        prompt: the ids that the new ones follow, from the beginning of the row.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before = find_context(tokenizer, prompt)
        self._held: list[int] = []

    def push(self, token: int, *, last: bool = False) -> str:
        """The piece of text that a token adds; the last one also gives what was held back."""
        self._held.append(token)
        piece = decode_behind(self._tokenizer, self._before, self._held)
        if piece.endswith(_UNFINISHED) and not last:
            return ""
        # Tokens without text, special ones, cannot stand for those before them.
        has_text = bool(decode_plain(self._tokenizer, self._held))
        self._before = self._held if has_text else [*self._before, *self._held]
        self._held = []
        return piece


class StopTexts:
    """Finds stop strings in the end of a row's new text.

    Args:
        tokenizer: decodes.
        texts: the stop strings.
    """

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._texts = list(texts)
        # Earlier tokens were looked at when they came: the end long enough for the longest stop string will do.
        self._reach = _TOKENS_PER_CHARACTER * (1 + max(len(text) for text in texts))

    def occurs_in(self, new_ids: Sequence[int], *, before: Sequence[int] = ()) -> bool:
        """Whether the text of the newest tokens holds a stop string.

        Args:
            new_ids: the new tokens.
            before: what they follow, see `find_context`.
        """
        if len(new_ids) > self._reach:
            text = decode_plain(self._tokenizer, new_ids[-self._reach :])
        else:
            text = decode_behind(self._tokenizer, before, new_ids)
        return any(stop in text for stop in self._texts)
