"""Which ids of a batch are padding: decided row by row, and never guessed."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError, PaddingWarning
from hooklens.tokens import dedicated_pad_id, mask_of_ids, padding_token_id, read_tokens, to_tokens
from tests.annotations import unchecked
from tests.tokens.tokenizers import (
    BOS_IS_EOS,
    BYTES,
    KINDS,
    NO_BOS,
    ONLY_BOS,
    PAD_IS_EOS,
    PAD_IS_UNKNOWN,
    PLAIN,
    WITH_BOS,
    WITH_BOTH,
    WITH_EOS,
    WITHOUT_DEDICATED_PAD,
    WORDS,
)

IDS = st.integers(1, 5).flatmap(
    lambda width: st.lists(st.lists(st.integers(0, 8), min_size=width, max_size=width), min_size=1, max_size=4)
)
SIDES = st.sampled_from([None, "left", "right"])


def masks(ids, tokenizer, side=None):
    """The mask as lists, ones where there is none."""
    mask = mask_of_ids(torch.tensor(ids), tokenizer, padding_side=side)
    return [[1] * len(row) for row in ids] if mask is None else mask.tolist()


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(PLAIN, 0), (PAD_IS_EOS, None), (BOS_IS_EOS, None), (PAD_IS_UNKNOWN, None), (ONLY_BOS, None), (None, None)],
)
def test_a_dedicated_pad_id_means_nothing_else(tokenizer, expected):
    assert dedicated_pad_id(tokenizer) == expected


class TestMaskOfIds:
    @given(ids=IDS, tokenizer=st.sampled_from(list(KINDS.values())), side=SIDES)
    def test_no_row_depends_on_another(self, ids, tokenizer, side):
        """A row's mask was guessed from whether its neighbours begin and end with the pad id, too."""
        ids = [row for row in ids if any(row)] or [[1]]
        assert masks(ids, tokenizer, side) == [masks([row], tokenizer, side)[0] for row in ids]

    @given(ids=IDS, kind=st.sampled_from(sorted(WITHOUT_DEDICATED_PAD)), side=SIDES)
    def test_without_a_dedicated_pad_id_all_ids_are_tokens(self, ids, kind, side):
        tokenizer = WITHOUT_DEDICATED_PAD[kind]
        assert mask_of_ids(torch.tensor(ids), tokenizer, padding_side=side) is None

    @pytest.mark.parametrize(
        ("row", "side", "expected"),
        [
            ([0, 0, 5], None, [0, 0, 1]),
            ([5, 0, 0], None, [1, 0, 0]),
            ([0, 5, 0], None, [0, 1, 0]),
            ([0, 5, 0], "left", [0, 1, 1]),
            ([0, 5, 0], "right", [1, 1, 0]),
            ([4, 0, 5], None, [1, 1, 1]),
            ([0, 4, 0, 5, 0, 0], None, [0, 1, 1, 1, 0, 0]),
            ([1, 1, 2], None, [1, 1, 1]),
        ],
    )
    def test_runs_of_a_dedicated_pad_id_at_the_ends_are_padding(self, row, side, expected):
        assert masks([row], PLAIN, side) == [expected]

    def test_nothing_hidden_is_no_mask(self):
        assert mask_of_ids(torch.tensor([[4, 0, 5]]), PLAIN) is None
        assert mask_of_ids(torch.tensor([[0, 0, 5]]), PLAIN, padding_side="right") is None
        assert mask_of_ids(torch.tensor([[0, 0]]), None) is None

    def test_rows_of_nothing_but_padding_are_named(self):
        with pytest.raises(InputError, match=r"rows \[0, 2\] hold nothing but the pad token \(id 0\)"):
            mask_of_ids(torch.tensor([[0, 0], [0, 4], [0, 0]]), PLAIN)

    def test_an_unknown_side(self):
        with unchecked(), pytest.raises(InputError, match="padding_side is 'middle'; expected 'left' or 'right'"):
            mask_of_ids(torch.tensor([[4]]), PLAIN, padding_side="middle")

    @settings(max_examples=200)
    @given(
        texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=5),
        tokenizer=st.sampled_from([PLAIN, WITH_BOS, WITH_EOS, WITH_BOTH]),
        prepend_bos=st.sampled_from([None, True, False]),
        side=st.sampled_from(["left", "right"]),
        tell_side=st.booleans(),
    )
    def test_a_dedicated_pad_id_gives_back_the_mask_of_text(self, texts, tokenizer, prepend_bos, side, tell_side):
        ids, mask = to_tokens(tokenizer, texts, prepend_bos=prepend_bos, padding_side=side, return_attention_mask=True)
        assert masks(ids.tolist(), tokenizer, side if tell_side else None) == mask.tolist()

    @pytest.mark.parametrize("tokenizer", [*KINDS.values(), NO_BOS, BYTES])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_text_has_the_mask_of_its_padding_whatever_it_is_filled_with(self, tokenizer, side):
        ids, mask = to_tokens(tokenizer, ["the cat sat", "the"], padding_side=side, return_attention_mask=True)
        width = ids.shape[1]
        n = len(tokenizer("the").input_ids)
        assert mask.tolist() == [
            [1] * width,
            [0] * (width - n) + [1] * n if side == "left" else [1] * n + [0] * (width - n),
        ]
        assert ids[mask == 0].unique().tolist() == [padding_token_id(tokenizer) or 0]


class TestLikelyPadding:
    @pytest.mark.parametrize(
        ("ids", "tokenizer", "text"),
        [
            ([[2, 2, 5], [4, 5, 6]], BOS_IS_EOS, r"rows \[0\] of the token ids begin with several '</s>' \(id 2\)"),
            ([[2, 2, 5], [2, 5, 6]], BOS_IS_EOS, "the tokenizer's EOS and BOS token"),
            (
                [[4, 5, 6], [5, 2, 2]],
                PAD_IS_EOS,
                r"rows \[1\] of the token ids end .* the tokenizer's pad and EOS token",
            ),
            (
                [[4, 5, 6], [5, 3, 3]],
                PAD_IS_UNKNOWN,
                r"rows \[1\] .* end with several '<unk>' .* the tokenizer's pad token",
            ),
            ([[1, 1, 6], [5, 4, 4]], ONLY_BOS, r"rows \[0\] .* begin with several '<s>'"),
        ],
    )
    def test_is_warned_of_at_the_callers_line(self, ids, tokenizer, text):
        with pytest.warns(PaddingWarning, match=rf"{text}.*pass attention_mask: to_tokens\(.*mask=True\)") as record:
            found = read_tokens(torch.tensor(ids), tokenizer, d_vocab=9)
        assert [warning.filename for warning in record] == [__file__]
        assert found.ids.tolist() == ids
        assert found.attention_mask is None

    @pytest.mark.parametrize(
        ("ids", "tokenizer", "mask"),
        [
            ([[2, 2, 5]], BOS_IS_EOS, None),
            ([[2, 5, 6], [4, 5, 6]], BOS_IS_EOS, None),
            ([[2, 2, 6], [2, 2, 4]], BOS_IS_EOS, None),
            ([[4, 2, 2, 6], [4, 5, 6, 7]], BOS_IS_EOS, None),
            ([[2, 2, 5], [4, 5, 6]], BOS_IS_EOS, [[1, 1, 1], [1, 1, 1]]),
            ([[2], [5]], BOS_IS_EOS, None),
            ([[1, 1, 5], [4, 5, 6]], PLAIN, None),
            ([[0, 0, 5], [4, 5, 6]], PLAIN, None),
            ([[0, 0, 5], [4, 5, 6]], BOS_IS_EOS, None),
            ([[0, 0, 5], [4, 5, 6]], None, None),
        ],
    )
    def test_is_not_seen_where_ids_tell(self, ids, tokenizer, mask):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mask = None if mask is None else torch.tensor(mask)
            assert read_tokens(torch.tensor(ids), tokenizer, d_vocab=9, attention_mask=mask).ids.tolist() == ids

    def test_text_is_never_suspected(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_tokens(["the cat sat", "the"], BOS_IS_EOS, d_vocab=9)
