"""Text of generated tokens: whole, in pieces as tokens come, and the search for stop strings."""

from collections.abc import Sequence

from hooklens.tokens import Tokenizer

# A character is at most four bytes, so at most four tokens hold one.
_TOKENS_PER_CHARACTER = 4
_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


def decode_plain(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids without special tokens."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


class TextPieces:
    """Turns a growing row of tokens into pieces of text whose sum is the new text.

    A token is decoded together with tokens before it, since what it reads as may depend on them; one that ends
    inside a character gives an empty piece, and the character comes with a later one.

    Args:
        tokenizer: decodes.
        prompt: the ids that the new ones follow.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-2 * _TOKENS_PER_CHARACTER :])
        # Text before `_shown` is out; decoding starts at `_start`, a little before it.
        self._start, self._shown = 0, len(self._ids)

    def push(self, token: int, *, last: bool = False) -> str:
        """The piece of text that a token adds; the last one also gives what was held back."""
        self._ids.append(token)
        before = decode_plain(self._tokenizer, self._ids[self._start : self._shown])
        after = decode_plain(self._tokenizer, self._ids[self._start :])
        if after.endswith(_UNFINISHED) and not last:
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return after[len(before) :]


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

    def occurs_in(self, new_ids: Sequence[int]) -> bool:
        """Whether the text of the newest tokens holds a stop string."""
        text = decode_plain(self._tokenizer, new_ids[-self._reach :])
        return any(stop in text for stop in self._texts)
