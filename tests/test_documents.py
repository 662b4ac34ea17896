"""Tests of hooklens.documents: what is packed comes out again, and rows are few."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens import HookLensError, documents
from hooklens.documents import NO_DOCUMENT, pack, unpack
from hooklens.errors import InputError
from tests.annotations import unchecked

TOKENS = st.lists(st.integers(0, 50), max_size=9)


def pieces_of(token_lists, length):
    return [
        (index, tokens[start : start + length])
        for index, tokens in enumerate(token_lists)
        for start in range(0, len(tokens), length)
    ]


@given(token_lists=st.lists(TOKENS, min_size=1, max_size=12), length=st.integers(1, 12), pad_id=st.integers(0, 60))
def test_every_document_stands_in_one_row_in_one_piece(token_lists, length, pad_id):
    longest = max(map(len, token_lists))
    if longest == 0:
        with pytest.raises(InputError, match="no token"):
            pack(token_lists, length)
        return
    if longest > length:
        with pytest.raises(InputError, match="longer than a row"):
            pack(token_lists, length, pad_id=pad_id)
    ids, of_each = pack(token_lists, length, pad_id=pad_id, split=longest > length)
    assert ids.shape == of_each.shape
    assert ids.shape[1] == length
    found = []
    for row, numbers in zip(ids.tolist(), of_each.tolist(), strict=True):
        padding = [number == NO_DOCUMENT for number in numbers]
        # Padding at the end, and never a row of nothing else.
        assert padding == sorted(padding)
        assert not padding[0]
        assert all(token == pad_id for token, is_padding in zip(row, padding, strict=True) if is_padding)
        runs = [column for column in range(length) if column == 0 or numbers[column] != numbers[column - 1]]
        for start, stop in zip(runs, [*runs[1:], length], strict=True):
            if numbers[start] != NO_DOCUMENT:
                found.append((numbers[start], row[start:stop]))
        assert [numbers[start] for start in runs if numbers[start] >= 0] == sorted(set(numbers) - {NO_DOCUMENT})
    assert sorted(found) == sorted(pieces_of(token_lists, length))
    assert {index: tokens.tolist() for index, tokens in unpack(ids, of_each).items()} == {
        index: tokens for index, tokens in enumerate(token_lists) if tokens
    }


@given(lengths=st.lists(st.integers(1, 10), min_size=1, max_size=9), width=st.integers(10, 14))
def test_rows_are_at_most_two_ninths_more_than_the_fewest(lengths, width):
    """Best-fit decreasing: at most 11/9 of the best and 4 more; the best is found by trying all assignments."""

    def fewest(left, room):
        if not left:
            return len(room)
        options = {tuple(sorted([*room[:i], free - left[0], *room[i + 1 :]])) for i, free in enumerate(room)
                   if free >= left[0]}  # fmt: skip
        best = min((fewest(left[1:], option) for option in options), default=len(lengths))
        return best if best <= len(room) else min(best, fewest(left[1:], tuple(sorted([*room, width - left[0]]))))

    found = len(pack([[1] * n for n in lengths], width).ids)
    assert found >= -(-sum(lengths) // width)
    if len(lengths) <= 6:
        assert found <= 11 / 9 * fewest(tuple(sorted(lengths, reverse=True)), ()) + 1


def test_pieces_of_a_long_document_keep_its_id():
    ids, of_each = pack([[1, 2], list(range(10, 17)), [3]], 3, pad_id=9, split=True)
    assert ids.tolist() == [[10, 11, 12], [13, 14, 15], [1, 2, 16], [3, 9, 9]]
    assert of_each.tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 1], [2, -1, -1]]
    assert unpack(ids, of_each)[1].tolist() == list(range(10, 17))


def test_token_lists_of_every_kind():
    kinds = [[1, 2], (3,), np.array([4, 5], dtype=np.int32), torch.tensor([6], dtype=torch.uint8), []]
    with unchecked():
        ids, of_each = pack(iter(kinds), 4)
    assert {index: tokens.tolist() for index, tokens in unpack(ids, of_each).items()} == {
        0: [1, 2],
        1: [3],
        2: [4, 5],
        3: [6],
    }


@pytest.mark.parametrize(
    ("given_lists", "text"),
    [
        ("text", "token lists"),
        (3, "token lists"),
        ([1, 2], "document 0"),
        ([[1], [0.5]], "document 1"),
        ([[1], ["a"]], "document 1"),
        ([[1], [True]], "document 1"),
        ([[1, -1]], "document 0"),
        ([[[1]]], "document 0"),
        ([None], "document 0"),
        ([torch.zeros(2, dtype=torch.long, device="meta")], "document 0"),
        ([[10**30]], "document 0"),
        ([], "no token"),
    ],
)
def test_what_is_no_token_list_is_refused_by_name(given_lists, text):
    with unchecked(), pytest.raises(InputError, match=text):
        pack(given_lists, 4)


@pytest.mark.parametrize("length", [0, -1, 2.5, None, True, "4", 10**30])
def test_lengths_that_are_none(length):
    with unchecked(), pytest.raises(InputError, match="length"):
        pack([[1]], length)


@pytest.mark.parametrize("keywords", [{"pad_id": -1}, {"pad_id": None}, {"split": 1}, {"split": "no"}])
def test_options_that_are_none(keywords):
    with unchecked(), pytest.raises(InputError, match=next(iter(keywords))):
        pack([[1]], 4, **keywords)


def test_all_documents_that_are_too_long_are_named():
    with pytest.raises(InputError, match=r"1 \(5 tokens\), 3 \(6 tokens\) are longer than a row of 4"):
        pack([[1], [1] * 5, [2], [1] * 6], 4)


def test_activations_come_out_by_document():
    ids, of_each = pack([[1, 2], [3, 4, 5], [6]], 4)
    values = torch.stack([ids, 10 * ids], -1)
    assert unpack(values, of_each)[1].tolist() == [[3, 30], [4, 40], [5, 50]]
    for wrong in ((values, of_each[:1]), (values, of_each.float()), (values[0], of_each[0]), (None, of_each)):
        with unchecked(), pytest.raises(HookLensError, match="unpack"):
            unpack(*wrong)


def test_the_module_is_public():
    assert documents.pack is pack
