"""Text that goes on from tokens: encoded together with what stands before it, never alone.

Alone, a text may get other tokens than inside the whole: SentencePiece-like tokenizers put a space in front of what
they encode (`Prepend`, `Metaspace`), and letters on both sides of the border may make one token.

**The rule.** The text before and the text that goes on are encoded as one; what follows the tokens of the text before
is what the text adds. Where the whole does not begin with those tokens there is no such border, and the text is
refused with both tokenisations. Whoever may still choose where the first part ends (an evaluation, whose prefix is
text) moves the spaces at its end to what follows, as lm-evaluation-harness does (Gao et al. 2021, `_encode_pair`).

Tokens that are known by their ids alone stand for the text that the tokenizer makes them of. Special tokens are hard
borders, so only the text behind the last one counts. Ids that the tokenizer would not give for their own text (words
cut in the middle, sampled tokens) are run as they are, and what their text and its continuation are together tells
what the continuation adds.
"""

from collections.abc import Sequence
from typing import NamedTuple

from hooklens.errors import InputError, join_names
from hooklens.tokens.ids import check_known_ids
from hooklens.tokens.tokenizer import Tokenizer, added_token_ids, decode, decode_each, encode, special_id
from hooklens.tokens.unknown import unknown_token_id

_SHOWN = 10
_SHOWN_TOKENS = 4
# A letter of nobody's alphabet (private use), which a vocabulary that lacks letters lacks.
_LACKING = "\ue000"


class TextBefore(NamedTuple):
    """What text goes on from.

    Attributes:
        ids: the tokens that run.
        text: what is encoded in the place of their end, together with the text behind them.
        encoded: the tokens of `text` alone, without special tokens around it.
    """

    ids: list[int]
    text: str
    encoded: list[int]

    @property
    def opening(self) -> list[int] | None:
        """The ids that `text` does not stand for; None where it stands for none of the ids, but for their text."""
        n_opening = len(self.ids) - len(self.encoded)
        return self.ids[:n_opening] if n_opening >= 0 and self.ids[n_opening:] == self.encoded else None


def find_text_before(tokenizer: Tokenizer, ids: Sequence[int], *, text: str | None = None) -> TextBefore:
    """A text for tokens, such that the tokenizer makes their end of it wherever there is such a text.

    Args:
        tokenizer: encodes and decodes.
        ids: the tokens.
        text: what they were encoded from, where that is known.

    Raises:
        InputError: ids that the tokenizer does not have, which stand for no text.
    """
    row = list(ids)
    check_known_ids(tokenizer, [row])
    if text is not None:
        [encoded] = encode(tokenizer, [text], add_special_tokens=False)
        before = TextBefore(row, text, encoded)
        if before.opening is not None:
            return before
    candidates = _candidates(tokenizer, row)
    for candidate, n_tokens in candidates:
        [encoded] = encode(tokenizer, [candidate], add_special_tokens=False)
        if len(encoded) == n_tokens and row[len(row) - n_tokens :] == encoded:
            return TextBefore(row, candidate, encoded)
    likeliest = candidates[0][0]
    return TextBefore(row, likeliest, *encode(tokenizer, [likeliest], add_special_tokens=False))


def _candidates(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, int]]:
    """Texts that may stand for the end of a row, with the number of tokens that each stands for."""
    borders = added_token_ids(tokenizer)
    unknown = unknown_token_id(tokenizer)
    if unknown not in ids:
        return _behind_last(tokenizer, ids, borders)
    # The unknown token stands for words or letters that the vocabulary lacks, and sometimes for its own name.
    spelled = decode(tokenizer, [unknown])
    lacking = [
        (text.replace(spelled, _LACKING), n_tokens)
        for text, n_tokens in _behind_last(tokenizer, ids, borders - {unknown})
    ]
    return [*lacking, *_behind_last(tokenizer, ids, borders)]


def _behind_last(tokenizer: Tokenizer, ids: list[int], borders: frozenset[int]) -> list[tuple[str, int]]:
    """Texts of what stands behind the last of some tokens, and of that token with what stands behind it."""
    last = next((index for index in reversed(range(len(ids))) if ids[index] in borders), -1)
    stretch = ids[last + 1 :]
    # A decoder may drop the space that the tokenizer puts in front of a text, or one that is the text's own.
    decoded = decode(tokenizer, stretch) if stretch else ""
    texts = [decoded, " " + decoded] if stretch else [""]
    opens = all(token == special_id(tokenizer, "bos_token_id") for token in ids[: last + 1])
    first = [(text, len(stretch)) for text in texts]
    if last < 0:
        return first
    mark = decode(tokenizer, [ids[last]])
    behind = [(mark + text, len(stretch) + 1) for text in texts]
    # Behind a BOS that a tokenizer puts in front, a text is the first; behind one that it spells out, it is not.
    return [*first, *behind] if opens else [*behind, *first]


def encode_behind(tokenizer: Tokenizer, before: TextBefore, texts: Sequence[str]) -> list[list[int] | None]:
    """The tokens that each text adds; None where the whole does not begin with the tokens of the text before.

    No special token is added. A text may add no token.
    """
    wholes = encode(tokenizer, [before.text + text for text in texts], add_special_tokens=False) if texts else []
    n_before = len(before.encoded)
    return [whole[n_before:] if whole[:n_before] == before.encoded else None for whole in wholes]


def without_last_spaces(tokenizer: Tokenizer, before: TextBefore) -> tuple[TextBefore, str] | None:
    """The text before without the spaces at its end, and those spaces.

    None where there are none or nothing else, or where they are part of a token with what stands before them.
    """
    bare = before.text.rstrip()
    spaces = before.text[len(bare) :]
    opening = before.opening
    if not spaces or opening is None:
        return None
    [encoded] = encode(tokenizer, [bare], add_special_tokens=False)
    ids = [*opening, *encoded]
    return (TextBefore(ids, bare, encoded), spaces) if ids and before.ids[: len(ids)] == ids else None


def describe_clash(tokenizer: Tokenizer, before: TextBefore, text: str) -> str:
    """Why a text cannot go on from what stands before it, with both tokenisations."""
    [whole] = encode(tokenizer, [before.text + text], add_special_tokens=False)
    pairs = zip(before.encoded, whole, strict=False)
    same = next(
        (index for index, (one, other) in enumerate(pairs) if one != other), min(len(before.encoded), len(whole))
    )
    own, together = before.encoded[same:], whole[same:]
    start = f"after {same} tokens that agree " if same else ""
    spaced = before.text != before.text.rstrip()
    remedy = (
        "leave the space at the end of what stands before out, and begin the text with it"
        if spaced
        else "end what stands before where a word ends, and begin the text with the space or sign that follows"
    )
    return (
        f"{text!r} does not go on from the tokens before it: {start}they are {_show(tokenizer, own)}, and encoded "
        f"together with the text {_show(tokenizer, together)}; {remedy}, or pass token ids"
    )


def continue_rows(
    tokenizer: Tokenizer, past: Sequence[Sequence[int]], texts: Sequence[str], *, what: str = "prompt"
) -> list[list[int]]:
    """The tokens that texts add to rows of tokens.

    Args:
        tokenizer: encodes and decodes.
        past: what each text goes on from; one row serves all texts.
        texts: what goes on.
        what: what messages call a text.

    Raises:
        InputError: texts that do not begin at the border of a token (all are named), or ids before them that the
            tokenizer does not have.
    """
    assert len(past) in (1, len(texts))
    if len(past) == 1:
        shared = find_text_before(tokenizer, past[0])
        befores = [shared] * len(texts)
        rows = encode_behind(tokenizer, shared, texts)
    else:
        befores = [find_text_before(tokenizer, row) for row in past]
        rows = [encode_behind(tokenizer, before, [text])[0] for before, text in zip(befores, texts, strict=True)]
    wrong = [
        f"{what} {index}: {describe_clash(tokenizer, before, text)}"
        for index, (before, text, row) in enumerate(zip(befores, texts, rows, strict=True))
        if row is None
    ]
    if wrong:
        more = f"\nand {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise InputError("\n".join(wrong[:_SHOWN]) + more)
    return [row for row in rows if row is not None]


def closing_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    """The special tokens that a tokenizer puts behind what it encodes (an EOS, in some); none in most.

    Found out by encoding, since tokenizers keep the rule in different places. A text whose own tokens stand in one
    place only of what comes out decides.
    """
    found: list[int] = []
    for probe in (*texts[:1], "a", "0"):
        [bare] = encode(tokenizer, [probe], add_special_tokens=False)
        [full] = encode(tokenizer, [probe], add_special_tokens=True)
        ends = [end for end in range(len(bare), len(full) + 1) if full[end - len(bare) : end] == bare]
        if bare and ends:
            found = full[ends[-1] :]
            if len(ends) == 1:
                break
    return found


def _show(tokenizer: Tokenizer, ids: list[int]) -> str:
    if not ids:
        return "at their end"
    more = " ..." if len(ids) > _SHOWN_TOKENS else ""
    return f"{join_names(decode_each(tokenizer, ids[:_SHOWN_TOKENS]))}{more} (ids {ids[:_SHOWN_TOKENS]}{more})"
