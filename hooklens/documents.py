"""Several documents in a row: a corpus packed into rows of one length, and taken out again.

    ids, document_ids = documents.pack(token_lists, 1024)
    loss = model(ids, document_ids=document_ids, return_type="loss")

With its document ids a row gives what its documents give alone, so none has to be cut and little is padding.
"""

from bisect import insort
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import MOST_ENTRIES, read_flag, read_int, refusal
from hooklens.errors import InputError

NO_DOCUMENT = -1
"""The document id of padding."""

TokenList = Sequence[int] | Int[Tensor, " _"] | np.ndarray[Any, np.dtype[Any]]

_SHOWN = 10


class PackedRows(NamedTuple):
    """Documents in rows.

    Attributes:
        ids: token ids, `[row pos]`.
        document_ids: the index of each token's document in what was packed; `NO_DOCUMENT` for padding.
    """

    ids: Int[Tensor, "row pos"]
    document_ids: Int[Tensor, "row pos"]


def pack(token_lists: Iterable[TokenList], length: int, *, pad_id: int = 0, split: bool = False) -> PackedRows:
    """Documents packed into rows of one length, none of them cut unless it is longer than a row.

    Longest first, each into the row in which it leaves the least room, or else into a new one ("best-fit decreasing":
    at most 11/9 of the rows that would do, and 4 more; Johnson et al. 1974). In a row documents stand in the order
    given, rows in the order of their last documents, padding at the end. Documents without tokens stand nowhere.

    Args:
        token_lists: the token ids of each document: lists, arrays or tensors.
        length: columns of a row.
        pad_id: the token id of padding, which no call looks at.
        split: cut documents that are longer than a row into pieces of that length; they are documents of their own
            wherever they stand, under the id of the whole. False: they are refused.

    Returns:
        `(ids, document_ids)` on the CPU, for `model(ids, document_ids=document_ids)`.

    Raises:
        InputError: no token at all, something else than token ids, or documents that are too long; they are named.
    """
    length = read_int(length, what="pack: length", least=1, most=MOST_ENTRIES)
    pad_id = read_int(pad_id, what="pack: pad_id", least=0)
    split = read_flag(split, what="pack: split")
    documents = _read_token_lists(token_lists)
    too_long = {index: len(tokens) for index, tokens in enumerate(documents) if len(tokens) > length}
    if too_long and not split:
        shown = ", ".join(f"{index} ({n} tokens)" for index, n in list(too_long.items())[:_SHOWN])
        raise InputError(
            f"pack: documents {shown}{', ...' if len(too_long) > _SHOWN else ''} are longer than a row of {length}; "
            "make rows longer, leave them out, or cut them into pieces with split=True"
        )
    pieces = [
        (index, tokens[start : start + length])
        for index, tokens in enumerate(documents)
        for start in range(0, len(tokens), length)
    ]
    if not pieces:
        raise InputError("pack: there is no token in the token lists; expected at least one")
    rows = _assign_rows([len(tokens) for _, tokens in pieces], length)
    ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    document_ids = torch.full_like(ids, NO_DOCUMENT)
    for row, members in enumerate(rows):
        tokens = torch.cat([pieces[piece][1] for piece in members])
        counts = torch.tensor([len(pieces[piece][1]) for piece in members])
        ids[row, : len(tokens)] = tokens
        document_ids[row, : len(tokens)] = torch.tensor([pieces[piece][0] for piece in members]).repeat_interleave(
            counts
        )
    return PackedRows(ids, document_ids)


def unpack(values: Tensor, document_ids: Int[Tensor, "row pos"]) -> dict[int, Tensor]:
    """What belongs to each document, `[pos ...]`, by its id: the inverse of `pack`, also for logits or activations.

    Args:
        values: `[row pos ...]`: ids, logits, an activation.
        document_ids: as `pack` gave them.

    Raises:
        InputError: the two have other rows or positions.
    """
    is_whole = isinstance(document_ids, Tensor) and document_ids.ndim == 2 and not document_ids.is_floating_point()
    if not isinstance(values, Tensor) or not is_whole or values.shape[:2] != document_ids.shape:
        raise InputError(
            f"unpack: values {_describe(values)} and document_ids {_describe(document_ids)}; expected tensors "
            "[row pos ...] and [row pos], the second as pack gave it"
        )
    flat, of_each = values.flatten(0, 1), document_ids.flatten().to(values.device)
    found = sorted(set(of_each.tolist()))
    return {index: flat[of_each == index] for index in found if index != NO_DOCUMENT}


def _assign_rows(lengths: list[int], width: int) -> list[list[int]]:
    """The pieces of each row."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for piece in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = _find_first(room, lengths[piece])
        free, row = room.pop(place) if place < len(room) else (width, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        if free > lengths[piece]:
            insort(room, (free - lengths[piece], row))
    # By their last pieces: the rest of a document that was cut then stands below its other pieces.
    return sorted((sorted(members) for members in rows), key=lambda members: members[-1])


def _find_first(room: list[tuple[int, int]], needed: int) -> int:
    """The index of the least room that will do, of rows in ascending order of room."""
    low, high = 0, len(room)
    while low < high:
        middle = (low + high) // 2
        if room[middle][0] < needed:
            low = middle + 1
        else:
            high = middle
    return low


def _read_token_lists(given: object) -> list[Int[Tensor, " pos"]]:
    expected = "token lists: for each document a list, array or tensor of whole numbers >= 0"
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        raise refusal(given, "pack: token_lists", expected)
    return [_read_tokens(one, f"pack: document {index}") for index, one in enumerate(given)]


def _read_tokens(given: object, what: str) -> Int[Tensor, " pos"]:
    expected = "a list, array or tensor [pos] of whole numbers >= 0"
    try:
        tokens = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise refusal(given, what, expected) from None
    if isinstance(given, str | bytes) or tokens.ndim != 1 or tokens.is_meta or tokens.layout != torch.strided:
        raise refusal(given, what, expected)
    if not len(tokens):
        return torch.empty(0, dtype=torch.long)
    is_whole = not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
    if not is_whole or bool((tokens < 0).any()):
        raise refusal(given, what, expected)
    return tokens.long().cpu()


def _describe(given: object) -> str:
    return str(list(given.shape)) if isinstance(given, Tensor) else f"a {type(given).__name__}"
