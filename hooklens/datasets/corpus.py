"""Corpora: documents of tokens, one after another, from whatever holds them.

A corpus is

- a list (or any iterable) of texts, or of rows of token ids (lists, arrays, tensors), or one tensor `[document pos]`;
- an iterable of mappings with a text under `text_key`, or ids under `"tokens"` or `"input_ids"`: a data set of Hugging
  Face's `datasets` is one, streamed or not;
- a path to a JSON Lines file of such mappings (`.jsonl`, `.jsonl.gz`).

What goes on after an interruption reads it again from its beginning, so it must give the same documents in the same
order: an iterator, which gives its documents once, is refused.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import MOST_ENTRIES, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.tokens.prompts import read_prompts

Corpus = str | Path | Iterable[Any] | Tensor
"""What documents are read from."""

_EXPECTED = (
    "texts, rows of token ids, mappings with a text or with ids, or the path of a JSON Lines file (.jsonl, .jsonl.gz)"
)
_TEXTS_AT_ONCE = 256
_IDS = ("tokens", "input_ids")


def check_corpus(corpus: object, *, what: str) -> None:
    """Refuse what gives no documents, before anything runs.

    Raises:
        InputError: it is none, a file that is not there, or an iterator.
    """
    if isinstance(corpus, str | Path):
        path = Path(corpus)
        if not path.name.endswith((".jsonl", ".jsonl.gz")):
            raise InputError(f"{what} is {show(corpus)}, one text or another kind of file; expected {_EXPECTED}")
        if not path.is_file():
            raise InputError(f"{what}: there is no file {path}")
        return
    if isinstance(corpus, Iterator):
        raise InputError(
            f"{what} is {show(corpus)}, which gives its documents once; a recording that was interrupted reads them "
            "again: give a list, a data set, or an object whose __iter__ begins anew"
        )
    if isinstance(corpus, bytes | Mapping) or not isinstance(corpus, Iterable):
        raise InputError(f"{what} is {show(corpus)}; expected {_EXPECTED}")
    if isinstance(corpus, Tensor | np.ndarray) and corpus.ndim != 2:
        raise InputError(f"{what} is {show(corpus)}; expected ids [document pos], or a list of rows")


def read_documents(
    model: HookedCausalLM, corpus: Corpus, *, text_key: str = "text", prepend_bos: bool | None = None, what: str
) -> Iterator[Int[Tensor, " _"]]:
    """The tokens of each document, on the CPU; documents without any are left out.

    Args:
        model: whose tokenizer reads texts, and whose vocabulary ids are of.
        corpus: the documents.
        text_key: where mappings have their text.
        prepend_bos: the BOS rule for text, as for a call of the model.
        what: the argument, for messages.

    Raises:
        InputError: a document that is none; its number is named.
    """
    waiting: list[str] = []

    def encode(before: int) -> Iterator[Tensor]:
        """The documents that wait, the last of which stands before this number."""
        told = f"{what}: documents {before - len(waiting)} to {before - 1}"
        found = _encode(model, waiting, prepend_bos=prepend_bos, what=told) if waiting else []
        waiting.clear()
        yield from (tokens for tokens in found if len(tokens))

    number = 0
    for number, document in enumerate(_open(corpus, what=what)):
        content = _content_of(document, text_key=text_key, what=f"{what}: document {number}")
        if isinstance(content, str):
            waiting.append(content)
            if len(waiting) == _TEXTS_AT_ONCE:
                yield from encode(number + 1)
            continue
        yield from encode(number)
        tokens = _read_ids(model, content, f"{what}: document {number}")
        if len(tokens):
            yield tokens
    yield from encode(number + 1)


def _open(corpus: Corpus, *, what: str) -> Iterator[Any]:
    if not isinstance(corpus, str | Path):
        yield from corpus
        return
    path = Path(corpus)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{what}: {path}, line {number} is not JSON ({error})") from error


def _content_of(document: Any, *, text_key: str, what: str) -> Any:
    """The text or the ids of a document."""
    if not isinstance(document, Mapping):
        return document
    for key in (text_key, *_IDS):
        if document.get(key) is not None:
            return document[key]
    raise InputError(f"{what} has the keys {list(document)[:10]}; expected {text_key!r} (text_key) or 'tokens'")


def _encode(model: HookedCausalLM, texts: list[str], *, prepend_bos: bool | None, what: str) -> list[Int[Tensor, " _"]]:
    try:
        # Rows are cut to the model's context where they are packed, into pieces that are all kept.
        found = read_prompts(
            texts,
            model.tokenizer,
            d_vocab=model.cfg.d_vocab,
            n_ctx=MOST_ENTRIES,
            prepend_bos=model.bos_rule(prepend_bos=prepend_bos),
        )
    except HookLensError as error:
        raise InputError(f"{what}: {error}") from error
    return [row.cpu() for row in found]


def _read_ids(model: HookedCausalLM, given: Any, what: str) -> Int[Tensor, " pos"]:
    expected = f"a text or a row of token ids from 0 to {model.cfg.d_vocab - 1}"
    try:
        ids = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError(f"{what} is {show(given)}; expected {expected}") from None
    is_empty = ids.numel() == 0 and ids.ndim == 1
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if is_empty:
        return torch.empty(0, dtype=torch.long)
    if ids.ndim != 1 or not is_whole or bool((ids < 0).any()) or bool((ids >= model.cfg.d_vocab).any()):
        raise InputError(f"{what} is {show(given)}; expected {expected}")
    return ids.long().cpu()
