import copy
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import HookLensError, InputError
from hooklens.tokens import (
    padding_token_id,
    to_tokens,
)
from tests.tokens.tokenizers import (
    ALL_SPECIAL,
    BOS,
    BYTES,
    BYTES_WITH_BOS,
    BYTES_WITH_EOS,
    CAT,
    EOS,
    NO_BOS,
    PAD_IS_EOS,
    PLAIN,
    THE,
    WITH_BOS,
    WITH_BOTH,
    WITH_EOS,
    WORDS,
    word_tokenizer,
)


class TestBosRule:
    @pytest.mark.parametrize(
        ("tokenizer", "text", "prepend_bos", "expected"),
        [
            (PLAIN, "the cat", None, [THE, CAT]),
            (PLAIN, "the cat", True, [BOS, THE, CAT]),
            (PLAIN, "the cat", False, [THE, CAT]),
            (PLAIN, "<s> the", None, [BOS, THE]),
            (PLAIN, "<s> the", True, [BOS, THE]),
            (PLAIN, "<s> the", False, [BOS, THE]),
            (PLAIN, "<s> <s> the", None, [BOS, BOS, THE]),
            (PLAIN, "<s> <s> the", True, [BOS, THE]),
            (PLAIN, "", True, [BOS]),
            (WITH_BOS, "the cat", None, [BOS, THE, CAT]),
            (WITH_BOS, "the cat", True, [BOS, THE, CAT]),
            (WITH_BOS, "the cat", False, [THE, CAT]),
            (WITH_BOS, "<s> the", None, [BOS, THE]),
            (WITH_BOS, "<s> the", True, [BOS, THE]),
            (WITH_BOS, "<s> the", False, [BOS, THE]),
            (WITH_BOS, "the <s>", None, [BOS, THE, BOS]),
            (WITH_BOS, "", None, [BOS]),
            (WITH_BOS, "", True, [BOS]),
            (WITH_EOS, "the", None, [THE, EOS]),
            (WITH_EOS, "the", True, [BOS, THE, EOS]),
            (WITH_EOS, "the", False, [THE, EOS]),
            (WITH_BOTH, "the", None, [BOS, THE, EOS]),
            (WITH_BOTH, "<s> the", None, [BOS, THE, EOS]),
            (WITH_BOTH, "<s> the", True, [BOS, THE, EOS]),
            (WITH_BOTH, "the", False, [THE, EOS]),
            (WITH_BOTH, "", None, [BOS, EOS]),
        ],
    )
    def test_tokens(self, tokenizer, text, prepend_bos, expected):
        assert to_tokens(tokenizer, text, prepend_bos=prepend_bos).tolist() == [expected]

    @pytest.mark.parametrize(
        ("tokenizer", "prepend_bos", "front", "end"),
        [
            (BYTES, None, [], []),
            (BYTES, True, [0], []),
            (BYTES_WITH_BOS, None, [0], []),
            (BYTES_WITH_BOS, True, [0], []),
            (BYTES_WITH_BOS, False, [], []),
            (BYTES_WITH_EOS, None, [], [0]),
            (BYTES_WITH_EOS, True, [0], [0]),
            (BYTES_WITH_EOS, False, [], [0]),
        ],
    )
    def test_one_token_that_is_both_bos_and_eos(self, tokenizer, prepend_bos, front, end):
        middle = BYTES("the cat").input_ids
        assert to_tokens(tokenizer, "the cat", prepend_bos=prepend_bos).tolist() == [front + middle + end]

    def test_an_empty_text_does_not_pass_an_eos_off_as_the_bos(self):
        assert to_tokens(BYTES_WITH_EOS, "", prepend_bos=True).tolist() == [[0, 0]]
        assert to_tokens(BYTES_WITH_BOS, "", prepend_bos=True).tolist() == [[0]]

    @given(
        texts=st.lists(
            st.lists(st.sampled_from([*WORDS, "zebra"]), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=4
        ),
        tokenizer=st.sampled_from([PLAIN, WITH_BOS, WITH_EOS, WITH_BOTH, PAD_IS_EOS, NO_BOS, BYTES, BYTES_WITH_BOS]),
    )
    def test_the_default_is_what_the_tokenizer_does(self, texts, tokenizer):
        batch = to_tokens(tokenizer, texts, return_attention_mask=True)
        rows = [row[mask.bool()].tolist() for row, mask in zip(*batch, strict=True)]
        assert rows == tokenizer(texts).input_ids

    def test_prepend_bos_without_a_bos_token(self):
        with pytest.raises(
            InputError, match=r"prepend_bos=True: this tokenizer has no BOS token; set tokenizer.bos_token"
        ):
            to_tokens(NO_BOS, "the", prepend_bos=True)


class TestPadding:
    def test_sides(self):
        texts = ["the cat sat", "the"]
        right = to_tokens(PLAIN, texts, padding_side="right", return_attention_mask=True)
        assert right.tokens.tolist() == [[4, 5, 6], [4, 0, 0]]
        assert right.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
        left = to_tokens(PLAIN, texts, padding_side="left", return_attention_mask=True)
        assert left.tokens.tolist() == [[4, 5, 6], [0, 0, 4]]
        assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
        assert left.tokens.dtype == left.attention_mask.dtype == torch.int64

    def test_the_default_side_is_the_tokenizers(self):
        tokenizer = copy.deepcopy(PLAIN)
        for side in ("left", "right"):
            tokenizer.padding_side = side
            default, given_side = (
                to_tokens(tokenizer, ["the cat", "the"], return_attention_mask=True),
                to_tokens(PLAIN, ["the cat", "the"], padding_side=side, return_attention_mask=True),
            )
            assert default.tokens.equal(given_side.tokens)
            assert default.attention_mask.equal(given_side.attention_mask)

    def test_an_unknown_side_of_the_tokenizer_is_refused(self):
        tokenizer = copy.deepcopy(PLAIN)
        tokenizer.padding_side = "middle"
        with pytest.raises(InputError, match="padding_side is 'middle'; expected 'left' or 'right'"):
            to_tokens(tokenizer, "the")

    @pytest.mark.parametrize(
        ("special", "expected"),
        [(ALL_SPECIAL, 0), ({"bos_token": "<s>", "eos_token": "</s>"}, 2), ({"bos_token": "<s>"}, 1), ({}, None)],
    )
    def test_padding_without_a_pad_token_leaves_the_tokenizer_as_it_is(self, special, expected):
        tokenizer = word_tokenizer(**special)
        before = (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer), dict(tokenizer.special_tokens_map))
        assert padding_token_id(tokenizer) == expected
        batch = to_tokens(tokenizer, ["the cat", "sat"], return_attention_mask=True)
        assert batch.tokens.tolist() == [[4, 5], [6, expected or 0]]
        assert batch.attention_mask.tolist() == [[1, 1], [1, 0]]
        assert before == (
            tokenizer.pad_token,
            tokenizer.padding_side,
            len(tokenizer),
            dict(tokenizer.special_tokens_map),
        )


class TestLength:
    def test_truncation_keeps_the_front_and_warns_once(self):
        with pytest.warns(UserWarning, match="to_tokens cut") as record:
            batch = to_tokens(WITH_BOS, ["the cat sat on", "the", "the cat sat"], n_ctx=3)
        assert batch.tolist() == [[1, 4, 5], [1, 4, 0], [1, 4, 5]]
        assert [str(warning.message) for warning in record] == [
            "to_tokens cut 3 tokens from the end of 2 of 3 prompts to fit n_ctx=3 (prompt 0: 5, prompt 2: 4)"
        ]

    def test_truncation_is_done_where_it_is_asked_for(self):
        with pytest.warns(UserWarning, match="to_tokens cut 1 tokens"):
            assert to_tokens(PLAIN, "the cat sat", n_ctx=2, truncate=True).tolist() == [[4, 5]]

    def test_no_truncation_is_an_error(self):
        with pytest.raises(
            InputError, match=r"1 of 2 prompts are longer than n_ctx=2 tokens \(prompt 1: 3\); shorten them"
        ):
            to_tokens(PLAIN, ["the", "the cat sat"], n_ctx=2, truncate=False)

    def test_a_prompt_that_fits_gives_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert to_tokens(PLAIN, "the cat", n_ctx=2).tolist() == [[4, 5]]

    def test_prompts_over_the_tokenizers_own_limit_are_not_cut(self):
        tokenizer = word_tokenizer(**ALL_SPECIAL)
        tokenizer.model_max_length = 2
        assert to_tokens(tokenizer, "the cat sat on").shape == (1, 4)

    def test_empty_prompts(self):
        with pytest.raises(
            InputError, match=r"empty prompt: prompt 0, 2 of 3 has no token; give some text, or prepend_bos=True"
        ):
            to_tokens(PLAIN, ["", "the", " "])
        with pytest.raises(InputError, match=r"empty prompt: prompt 0 of 1 has no token; give some text$"):
            to_tokens(NO_BOS, "")
        with pytest.raises(InputError, match=r"no prompt was given: the text is empty \(\[\]\)"):
            to_tokens(PLAIN, [])


def test_errors_are_both_ours_and_value_errors():
    with pytest.raises(HookLensError) as caught:
        to_tokens(PLAIN, "")
    assert isinstance(caught.value, ValueError)
