"""What may be given as an input: text, several texts, or token ids in any of their forms. Read here, nowhere else.

Token ids are a tensor, a numpy array, a list of ints, or a list of rows of them. Ints may be Python's, numpy's, or
tensors without axes. Everything else is refused with what was found and what was expected.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from hooklens.arguments import read_flag
from hooklens.errors import InputError
from hooklens.tokens.ids import check_form, is_integer, is_token_id

Ids = (
    Integer[Tensor, "batch pos"]
    | Integer[Tensor, " pos"]
    | np.ndarray[Any, np.dtype[Any]]
    | Sequence[int | np.integer[Any] | Tensor]
    | Sequence[Sequence[int | np.integer[Any] | Tensor] | np.ndarray[Any, np.dtype[Any]]]
)
"""Token ids of one prompt or several, as a caller gives them."""

TextList = list[str] | tuple[str, ...]
"""Several prompts for a type checker, to which a string is a sequence of strings, too."""

OneNumber = int | float | np.integer[Any]
"""A token id. What `Tensor.item()` gives is any number to a type checker; one that is not whole is refused."""

Numbers = Sequence[int | np.integer[Any]]
"""Token ids of one prompt for a type checker, which does not know how many axes tensors and arrays have."""

Prompt = str | Sequence[str] | Ids
"""A prompt or several, as a caller gives them."""

_SHOWN = 10
_MOST = torch.iinfo(torch.int64).max


class Texts(NamedTuple):
    """An input that is text.

    Attributes:
        texts: at least one.
        is_batch: whether they came as a list.
    """

    texts: list[str]
    is_batch: bool


class TokenIds(NamedTuple):
    """An input that is token ids.

    Attributes:
        ids: where they were given; lists and arrays lie on the CPU.
        is_batch: whether they came as rows.
    """

    ids: Int[Tensor, "batch pos"]
    is_batch: bool


def is_text(given: object) -> bool:
    """Whether an input is meant as text, right or wrong in its details."""
    return isinstance(given, str) or (_is_sequence(given) and len(given) > 0 and isinstance(given[0], str))


def read_input(given: object, *, what: str = "the input", hint: str = "") -> Texts | TokenIds:
    """Bring an input to one of its two forms; ids become int64.

    Args:
        given: what a caller gave.
        what: what messages call it.
        hint: ends the message about a kind that is no input.

    Raises:
        InputError: it is neither text nor token ids, or empty, or rows of ids of different length.
    """
    if isinstance(given, str):
        return Texts([given], is_batch=False)
    if isinstance(given, Tensor | np.ndarray):
        ids = _read_array(given, what)
        check_form(ids)
        return TokenIds(ids.long() if ids.ndim == 2 else ids.long()[None], is_batch=ids.ndim == 2)
    if not _is_sequence(given):
        raise InputError(_refuse_kind(given, what, hint))
    if not len(given):
        raise InputError(f"no prompt was given: {what} is empty ({given!r})")
    if all(isinstance(one, str) for one in given):
        return Texts(list(given), is_batch=True)
    rows, is_batch = _read_sequence(given, what)
    empty = [index for index, row in enumerate(rows) if not row]
    if empty:
        raise InputError(f"token ids are empty: rows {empty[:_SHOWN]} have none; give at least one token")
    lengths = [len(row) for row in rows]
    if len(set(lengths)) > 1:
        more = ", ..." if len(lengths) > _SHOWN else ""
        raise InputError(
            f"{what} is rows of different length ({', '.join(map(str, lengths[:_SHOWN]))}{more} token ids); "
            "rows of ids must have one length: pad them and pass attention_mask with 1 for tokens and 0 for padding "
            "(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), and the same of rows of ones), or give texts, "
            "whose padding is known"
        )
    return TokenIds(torch.tensor(rows, dtype=torch.long), is_batch=is_batch)


def read_texts(given: object, *, what: str = "the text") -> list[str]:
    """Texts to encode, at least one.

    Raises:
        InputError: token ids, or what is no input at all.
    """
    read = read_input(given, what=what)
    if isinstance(read, TokenIds):
        raise InputError(f"{what} is token ids {list(read.ids.shape)}; expected a text or a list of texts to encode")
    return read.texts


def read_id_rows(given: object, *, what: str = "the tokens") -> tuple[list[list[int]], bool]:
    """Rows of ids to decode, and whether they came as rows: they may be of any lengths, and a single id is a row.

    Raises:
        InputError: they are no ids, or some are negative.
    """
    if is_token_id(given):
        rows, is_batch = [[int(given)]], False  # type: ignore[call-overload]
    elif isinstance(given, Tensor | np.ndarray):
        ids = _read_array(given, what)
        if not is_integer(ids) or ids.ndim not in (1, 2):
            raise InputError(
                f"token ids have shape {list(ids.shape)} and dtype {ids.dtype}; expected integers [pos] or [batch pos]"
            )
        if ids.is_meta:
            raise InputError(f"{what} lies on the device 'meta', where tensors have no values")
        is_batch = ids.ndim == 2
        rows = ids.tolist() if is_batch else [ids.tolist()]
    elif _is_sequence(given):
        rows, is_batch = _read_sequence(given, what)
    else:
        raise InputError(_refuse_kind(given, what, ""))
    negative = sorted({token for row in rows for token in row if token < 0})
    if negative:
        raise InputError(f"token ids are negative: {', '.join(map(str, negative[:_SHOWN]))}; expected ids from 0 on")
    return rows, is_batch


def read_prepend_bos(given: object, *, what: str = "prepend_bos") -> bool | None:
    """The argument of the BOS rule: True, False or None.

    Raises:
        InputError: anything else.
    """
    if given is None:
        return None
    try:
        return read_flag(given, what=what)
    except InputError as refusal:
        raise InputError(f"{refusal}, or None (the tokenizer's own rule)") from None


def _is_sequence(given: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray | memoryview)


def _read_array(given: Tensor | np.ndarray[Any, np.dtype[Any]], what: str) -> Tensor:
    """A tensor as it is, an array as a tensor of int64.

    Raises:
        InputError: an array that does not hold integers, or a sparse tensor.
    """
    if isinstance(given, Tensor):
        if given.layout != torch.strided:
            raise InputError(f"{what} is a tensor of layout {given.layout}; expected token ids, .to_dense() gives them")
        return given
    if given.dtype.kind not in "iu":
        remedy = "; its list goes in: .tolist()" if given.dtype.kind in "UO" else ""
        raise InputError(f"{what} is an array of dtype {given.dtype}; expected token ids, an integer dtype{remedy}")
    if given.dtype.kind == "u" and given.size and int(given.max()) > _MOST:
        raise InputError(f"{what} holds {int(given.max())}, which is no token id")
    return torch.from_numpy(given.astype(np.int64))


def _read_sequence(given: Any, what: str) -> tuple[list[list[int]], bool]:
    """Rows of ids from a list of ids or of rows, and which of the two it was."""
    if not len(given):
        return [[]], False
    entries = list(given)
    if all(is_token_id(one) for one in entries):
        return [_read_row(entries, what)], False
    if all(_is_row(one) for one in entries):
        return [_read_row(_entries_of(row), f"row {index} of {what}") for index, row in enumerate(entries)], True
    raise InputError(_refuse_entries(entries, what))


def _is_row(one: object) -> bool:
    if isinstance(one, Tensor):
        return one.ndim > 0 and not one.is_meta and one.layout == torch.strided
    return (isinstance(one, np.ndarray) and one.ndim > 0) or _is_sequence(one)


def _entries_of(row: Any) -> list[Any]:
    """The entries of a row as plain numbers, where it is a tensor or an array."""
    return row.tolist() if isinstance(row, Tensor | np.ndarray) else list(row)


def _read_row(entries: list[Any], what: str) -> list[int]:
    if not all(is_token_id(one) for one in entries):
        raise InputError(_refuse_entries(entries, what))
    if entries and all(isinstance(one, Tensor) for one in entries):
        # One transfer for all of them, where they lie on an accelerator.
        entries = torch.stack([one.long() for one in entries]).tolist()
    ids = [int(one) for one in entries]
    large = [token for token in ids if not -_MOST <= token <= _MOST]
    if large:
        raise InputError(f"{what} holds {large[0]}, which is no token id")
    return ids


def _refuse_entries(entries: list[Any], what: str) -> str:
    """What to say of a list that is neither of texts nor of ids nor of rows of ids."""
    if all(_is_row(one) for one in entries):
        return f"{what} is nested too deeply; expected token ids [pos] or [batch pos]"
    kinds: dict[str, int] = {}
    for index, one in enumerate(entries):
        kinds.setdefault(_name_kind(one), index)
    found = ", ".join(f"{kind} (entry {index})" for kind, index in kinds.items())
    return (
        f"{what} is a list that holds {found}; expected texts only, token ids only, or rows of token ids of one length"
    )


def _refuse_kind(given: object, what: str, hint: str) -> str:
    """What to say of something that is no input."""
    if isinstance(given, Mapping):
        keys = ", ".join(map(repr, list(given)[:_SHOWN]))
        if "input_ids" in given:
            return (
                f"{what} is a {type(given).__name__} with the keys {keys}; pass its ids and its mask: "
                'encoding["input_ids"], attention_mask=encoding["attention_mask"]'
            )
        return f"{what} is a {type(given).__name__} with the keys {keys}; expected text or token ids"
    remedy = ""
    if isinstance(given, bytes | bytearray):
        remedy = "; .decode() makes text of bytes"
    elif is_token_id(given):
        remedy = f"; a prompt of one token is [{given}]"
    elif hasattr(given, "__iter__"):
        remedy = "; list(...) makes a list of it"
    expected = "text, a list of texts, or token ids (a tensor, an array, or lists of ints)"
    return f"{what} is {_name_kind(given)}; expected {expected}{hint}{remedy}"


def _name_kind(given: object) -> str:
    if given is None:
        return "None"
    if isinstance(given, str):
        return f"the text {given[:20]!r}"
    if isinstance(given, Tensor):
        without_values = " on the device 'meta'" if given.is_meta else ""
        return f"a tensor of {given.dtype}{without_values}"
    name = type(given).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"
