"""Words that a vocabulary lacks: the tokenizer makes one and the same token of all of them, without a word."""

from collections.abc import Sequence

from hooklens.errors import UnknownTokenWarning, join_names, warn_caller
from hooklens.tokens.tokenizer import Tokenizer, encode, special_id


def unknown_token_id(tokenizer: Tokenizer) -> int | None:
    """The id that stands for unknown words alone; None where it also is BOS, EOS or padding, or there is none.

    Byte-level tokenizers know every text; theirs is often set to the BOS and never occurs.
    """
    unknown = special_id(tokenizer, "unk_token_id")
    others = [special_id(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")]
    return None if unknown in others else unknown


def unknown_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[str]:
    """The words or pieces of texts that become the unknown token, each once; those that spell it out are no such."""
    unknown = unknown_token_id(tokenizer)
    if unknown is None or not texts:
        return []
    pieces: list[str] = []
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=True, padding=False, truncation=False
        )
        for text, ids, offsets in zip(texts, encoding["input_ids"], encoding["offset_mapping"], strict=True):
            pieces += [text[start:stop] for token, (start, stop) in zip(ids, offsets, strict=True) if token == unknown]
    else:
        # Without places in the text: the words that alone give the unknown token.
        words = [word for text in texts for word in text.split()]
        rows = encode(tokenizer, words, add_special_tokens=False) if words else []
        pieces += [word for word, row in zip(words, rows, strict=True) if unknown in row]
    spelled = getattr(tokenizer, "unk_token", None)
    return list(dict.fromkeys(piece for piece in map(str.strip, pieces) if piece != spelled))


def warn_of_unknown(tokenizer: Tokenizer, texts: Sequence[str], rows: Sequence[Sequence[int]]) -> None:
    """Warn where texts, encoded as rows, hold words that the vocabulary lacks."""
    unknown = unknown_token_id(tokenizer)
    if unknown is None:
        return
    pieces = unknown_pieces(tokenizer, [text for text, row in zip(texts, rows, strict=True) if unknown in row])
    if pieces:
        warn_caller(
            f"the tokenizer's vocabulary lacks {join_names(pieces)}: in the place of each stands the unknown token "
            f"{getattr(tokenizer, 'unk_token', None)!r} (id {unknown}), so the model cannot tell them apart; use words "
            "that it has",
            UnknownTokenWarning,
        )
