"""Tests of hooklens.tokens against small real tokenizers built with the `tokenizers` library."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hooklens.errors import HookLensError, InputError
from hooklens.tokens import (
    check_token_ids,
    get_token_position,
    infer_attention_mask,
    padding_token_id,
    to_single_str_token,
    to_single_token,
    to_str_tokens,
    to_string,
    to_tokens,
)

WORDS = ["the", "cat", "sat", "on", "mat"]
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]


def word_tokenizer(*, template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """Words split at spaces: ids 0 to 3 are SPECIALS, then WORDS."""
    vocab = {word: index for index, word in enumerate(SPECIALS + WORDS)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template is not None:
        named = [(token, vocab[token]) for token in SPECIALS if token in template.split()]
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=named)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def byte_tokenizer(*, template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which one token is BOS, EOS and padding, as in the GPT-2 and GPT-NeoX checkpoints."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat", "the mat, the cat", "Paris and the cat"] * 3, trainer)
    if template is not None:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|end|>", eos_token="<|end|>", pad_token="<|end|>"
    )


ALL_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
PLAIN = word_tokenizer(**ALL_SPECIAL)
WITH_BOS = word_tokenizer(template="<s> $A", **ALL_SPECIAL)
WITH_EOS = word_tokenizer(template="$A </s>", **ALL_SPECIAL)
WITH_BOTH = word_tokenizer(template="<s> $A </s>", **ALL_SPECIAL)
PAD_IS_EOS = word_tokenizer(template="<s> $A </s>", bos_token="<s>", eos_token="</s>", pad_token="</s>")
NO_BOS = word_tokenizer(eos_token="</s>")
BYTES = byte_tokenizer()
BYTES_WITH_BOS = byte_tokenizer(template="<|end|> $A")
BYTES_WITH_EOS = byte_tokenizer(template="$A <|end|>")

BOS, EOS, THE, CAT, SAT = 1, 2, 4, 5, 6


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
        assert to_tokens(tokenizer, text, prepend_bos=prepend_bos).tokens.tolist() == [expected]

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
        assert to_tokens(tokenizer, "the cat", prepend_bos=prepend_bos).tokens.tolist() == [front + middle + end]

    def test_an_empty_text_does_not_pass_an_eos_off_as_the_bos(self):
        assert to_tokens(BYTES_WITH_EOS, "", prepend_bos=True).tokens.tolist() == [[0, 0]]
        assert to_tokens(BYTES_WITH_BOS, "", prepend_bos=True).tokens.tolist() == [[0]]

    @given(
        texts=st.lists(
            st.lists(st.sampled_from([*WORDS, "zebra"]), min_size=1, max_size=5).map(" ".join), min_size=1, max_size=4
        ),
        tokenizer=st.sampled_from([PLAIN, WITH_BOS, WITH_EOS, WITH_BOTH, PAD_IS_EOS, NO_BOS, BYTES, BYTES_WITH_BOS]),
    )
    @settings(deadline=None)
    def test_the_default_is_what_the_tokenizer_does(self, texts, tokenizer):
        batch = to_tokens(tokenizer, texts)
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
        right = to_tokens(PLAIN, texts, padding_side="right")
        assert right.tokens.tolist() == [[4, 5, 6], [4, 0, 0]]
        assert right.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
        left = to_tokens(PLAIN, texts, padding_side="left")
        assert left.tokens.tolist() == [[4, 5, 6], [0, 0, 4]]
        assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
        assert left.tokens.dtype == left.attention_mask.dtype == torch.int64

    def test_the_default_side_is_the_tokenizers(self):
        tokenizer = copy.deepcopy(PLAIN)
        for side in ("left", "right"):
            tokenizer.padding_side = side
            default, given_side = (
                to_tokens(tokenizer, ["the cat", "the"]),
                to_tokens(PLAIN, ["the cat", "the"], padding_side=side),
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
        batch = to_tokens(tokenizer, ["the cat", "sat"])
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
        assert batch.tokens.tolist() == [[1, 4, 5], [1, 4, 0], [1, 4, 5]]
        assert [str(warning.message) for warning in record] == [
            "to_tokens cut 3 tokens from the end of 2 of 3 prompts to fit n_ctx=3 (prompt 0: 5, prompt 2: 4)"
        ]

    def test_no_truncation_is_an_error(self):
        with pytest.raises(
            InputError, match=r"1 of 2 prompts are longer than n_ctx=2 tokens \(prompt 1: 3\); shorten them"
        ):
            to_tokens(PLAIN, ["the", "the cat sat"], n_ctx=2, truncate=False)

    def test_a_prompt_that_fits_gives_no_warning(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert to_tokens(PLAIN, "the cat", n_ctx=2).tokens.tolist() == [[4, 5]]

    def test_prompts_over_the_tokenizers_own_limit_are_not_cut(self):
        tokenizer = word_tokenizer(**ALL_SPECIAL)
        tokenizer.model_max_length = 2
        assert to_tokens(tokenizer, "the cat sat on").tokens.shape == (1, 4)

    def test_empty_prompts(self):
        with pytest.raises(
            InputError, match=r"empty prompt: prompt 0, 2 of 3 has no token; give some text, or prepend_bos=True"
        ):
            to_tokens(PLAIN, ["", "the", " "])
        with pytest.raises(InputError, match=r"empty prompt: prompt 0 of 1 has no token; give some text$"):
            to_tokens(NO_BOS, "")
        with pytest.raises(InputError, match="no prompt was given: the list of texts is empty"):
            to_tokens(PLAIN, [])


def infer_for(tokenizer, tokens, padding_side):
    return infer_attention_mask(
        tokens,
        pad_token_id=padding_token_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        padding_side=padding_side,
    )


class TestInferAttentionMask:
    @given(
        texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=5).map(" ".join), min_size=1, max_size=5),
        tokenizer=st.sampled_from(
            [PLAIN, WITH_BOS, WITH_EOS, WITH_BOTH, PAD_IS_EOS, BYTES, BYTES_WITH_BOS, BYTES_WITH_EOS, NO_BOS]
        ),
        prepend_bos=st.sampled_from([None, True, False]),
        side=st.sampled_from(["left", "right"]),
        tell_side=st.booleans(),
    )
    @settings(deadline=None, max_examples=400)
    def test_gives_back_the_mask_that_to_tokens_made(self, texts, tokenizer, prepend_bos, side, tell_side):
        if tokenizer is NO_BOS and prepend_bos:
            prepend_bos = None
        try:
            batch = to_tokens(tokenizer, texts, prepend_bos=prepend_bos, padding_side=side)
        except InputError:  # an empty prompt without BOS
            return
        real = [row[mask.bool()] for row, mask in zip(*batch, strict=True)]
        pad = padding_token_id(tokenizer)
        # Not decidable, as documented: a prompt that is only the pad id, several times or with no side told.
        only_pad = [row for row in real if bool((row == pad).all())]
        if any(len(row) > 1 for row in only_pad) or (only_pad and not tell_side):
            return
        inferred = infer_for(tokenizer, batch.tokens, side if tell_side else None)
        expected = batch.attention_mask
        assert (torch.ones_like(expected) if inferred is None else inferred).tolist() == expected.tolist()

    @pytest.mark.parametrize(
        ("tokens", "special", "side", "expected"),
        [
            # padding that means nothing else
            ([[9, 9, 5], [4, 5, 6]], (9, 1, 2), None, [[0, 0, 1], [1, 1, 1]]),
            ([[5, 9, 9], [4, 5, 6]], (9, 1, 2), None, [[1, 0, 0], [1, 1, 1]]),
            ([[5, 9, 9], [4, 5, 6]], (9, 1, 2), "left", None),
            ([[4, 9, 5], [4, 5, 6]], (9, 1, 2), None, None),
            ([[9, 9, 5]], (9, 1, 2), None, [[0, 0, 1]]),
            # padding is BOS: every row starts with it, so each keeps one ...
            ([[9, 9, 5], [9, 4, 5]], (9, 9, 2), None, [[0, 1, 1], [1, 1, 1]]),
            # ... some row does not, so no row was given a BOS
            ([[9, 9, 5], [4, 5, 6]], (9, 9, 2), None, [[0, 0, 1], [1, 1, 1]]),
            ([[9, 9, 5]], (9, 9, 2), None, None),
            ([[9, 9, 5]], (9, 9, 2), "left", None),
            # padding is EOS
            ([[5, 9, 9], [4, 5, 9]], (9, 1, 9), None, [[1, 1, 0], [1, 1, 1]]),
            ([[5, 9, 9], [4, 5, 6]], (9, 1, 9), None, [[1, 0, 0], [1, 1, 1]]),
            ([[5, 9, 9]], (9, 1, 9), None, None),
            ([[9, 1, 5]], (9, 1, 9), None, [[0, 1, 1]]),
            # rows of nothing but the pad id
            ([[9, 9, 9], [9, 4, 5]], (9, 9, 9), "left", [[0, 0, 1], [1, 1, 1]]),
            ([[9, 9, 9], [9, 4, 5]], (9, 9, 9), "right", [[1, 0, 0], [1, 1, 1]]),
            ([[9, 9, 9], [9, 4, 5]], (9, 9, 9), None, [[1, 0, 0], [1, 1, 1]]),
            ([[9, 9, 9], [9, 9, 5], [9, 4, 5]], (9, 9, 9), None, [[0, 0, 1], [0, 1, 1], [1, 1, 1]]),
            ([[9, 9]], (9, 9, 9), None, None),
            ([[9, 9], [4, 5]], (9, 1, 2), None, [[0, 0], [1, 1]]),
            # no pad id at all
            ([[0, 0, 5], [4, 5, 6]], (None, None, None), None, None),
        ],
    )
    def test_rule(self, tokens, special, side, expected):
        pad, bos, eos = special
        inferred = infer_attention_mask(
            torch.tensor(tokens), pad_token_id=pad, bos_token_id=bos, eos_token_id=eos, padding_side=side
        )
        assert (None if inferred is None else inferred.tolist()) == expected

    def test_left_padded_rows_without_bos_lose_all_their_padding(self):
        """Keeping one pad id of each row as its BOS, where the two are one id, adds a token to such rows."""
        batch = to_tokens(BYTES, ["the cat sat on", "the"], padding_side="left")
        assert infer_for(BYTES, batch.tokens, "left").equal(batch.attention_mask)


class TestCheckTokenIds:
    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
    def test_good_ids_pass(self, dtype):
        assert check_token_ids(torch.tensor([[0, 9], [3, 4]], dtype=dtype), 10) is None
        assert check_token_ids(torch.tensor([9], dtype=dtype), 10) is None

    def test_all_offenders_are_named(self):
        with pytest.raises(
            InputError,
            match=r"outside the vocabulary: 10 \(row 0, position 1\), -1 \(row 1, position 0\); "
            r"this model has d_vocab=10, ids 0 to 9",
        ):
            check_token_ids(torch.tensor([[0, 10], [-1, 9]]), 10)
        with pytest.raises(InputError, match=r"12 \(row 0, position 2\);"):
            check_token_ids(torch.tensor([1, 2, 12]), 10)
        with pytest.raises(InputError, match=r"\(row 0, position 9\) and 90 more;"):
            check_token_ids(torch.full((1, 100), 11), 10)

    @pytest.mark.parametrize(
        ("tokens", "text"),
        [
            (torch.ones(1, 2), "dtype torch.float32; expected an integer dtype"),
            (torch.ones(1, 2, dtype=torch.bool), "dtype torch.bool; expected an integer dtype"),
            (torch.ones(1, 2, 3, dtype=torch.long), r"shape \[1, 2, 3\]; expected \[pos\] or \[batch pos\]"),
            (torch.tensor(3), r"shape \[\]; expected \[pos\]"),
            (torch.ones(2, 0, dtype=torch.long), r"empty \(shape \[2, 0\], an empty prompt\)"),
        ],
    )
    def test_what_is_no_ids(self, tokens, text):
        with pytest.raises(InputError, match=text):
            check_token_ids(tokens, 10)


class TestStrings:
    def test_to_string(self):
        ids = BYTES("the cat sat").input_ids
        assert to_string(BYTES, torch.tensor([0, *ids])) == "<|end|>the cat sat"
        assert to_string(BYTES, ids) == "the cat sat"
        assert to_string(BYTES, torch.tensor([ids, ids])) == ["the cat sat"] * 2
        assert to_string(BYTES, [ids, ids[:1]]) == ["the cat sat", to_string(BYTES, ids[:1])]
        assert to_string(BYTES, 0) == to_string(BYTES, torch.tensor(0)) == "<|end|>"
        assert to_string(BYTES, torch.zeros(0, 3, dtype=torch.long)) == []

    def test_what_cannot_be_decoded(self):
        with pytest.raises(InputError, match=r"shape \[2\] and dtype torch.float32; expected integers"):
            to_string(BYTES, torch.ones(2))
        with pytest.raises(InputError, match="token ids are negative: -3, -1; expected ids from 0 on"):
            to_string(BYTES, [-1, 4, -3])

    @given(text=st.text(min_size=1).filter(lambda text: "<|" not in text))
    @settings(deadline=None)
    def test_one_string_per_token(self, text):
        ids = to_tokens(BYTES, text, prepend_bos=True).tokens[0]
        pieces = to_str_tokens(BYTES, text, prepend_bos=True)
        assert pieces == to_str_tokens(BYTES, ids) == [BYTES.decode([token]) for token in ids]
        if text.isascii():
            assert "".join(pieces) == "<|end|>" + text

    def test_parts_of_a_character_show_as_the_replacement_character(self):
        assert to_str_tokens(BYTES, "é") == ["\ufffd", "\ufffd"]

    def test_several_prompts(self):
        expected = [["the", "cat"], ["sat"]]
        assert to_str_tokens(PLAIN, ["the cat", "sat"]) == expected
        assert to_str_tokens(PLAIN, [[4, 5], [6]]) == expected
        assert to_str_tokens(PLAIN, torch.tensor([[4, 5], [6, 0]])) == [["the", "cat"], ["sat", "<pad>"]]
        assert to_str_tokens(WITH_BOS, "the", prepend_bos=False) == ["the"]

    def test_empty_prompt(self):
        with pytest.raises(InputError, match="empty prompt: prompt 1 of 2"):
            to_str_tokens(PLAIN, ["the", ""])


class TestSingleTokens:
    def test_round_trip(self):
        token = to_single_token(BYTES, " cat")
        assert to_single_str_token(BYTES, token) == " cat"
        assert to_single_token(WITH_BOS, "cat") == CAT

    def test_the_pieces_are_named(self):
        with pytest.raises(
            InputError, match=r"'the cat' is 2 tokens: 'the', 'cat'; expected a text that is a single token\.$"
        ):
            to_single_token(PLAIN, "the cat")
        with pytest.raises(InputError, match="'' is no token at all"):
            to_single_token(PLAIN, "")

    def test_a_missing_space_is_hinted_at(self):
        with pytest.raises(
            InputError, match=r"'and' is 2 tokens: 'an', 'd'; expected .* ' and' is one \(mind the space\)"
        ):
            to_single_token(BYTES, "and")

    @pytest.mark.parametrize("token", [-1, len(PLAIN)])
    def test_unknown_id(self, token):
        with pytest.raises(
            InputError, match=f"token id {token} is not in the tokenizer's vocabulary; its ids are 0 to 8"
        ):
            to_single_str_token(PLAIN, token)


class TestGetTokenPosition:
    def test_positions(self):
        text = "the cat sat the"
        assert get_token_position(PLAIN, "the", text) == 0
        assert get_token_position(PLAIN, THE, text, mode="last") == 3
        assert get_token_position(PLAIN, "cat", text, prepend_bos=True) == 2
        assert get_token_position(PLAIN, "sat", torch.tensor([1, 4, 5, 6])) == 3
        assert get_token_position(PLAIN, "sat", torch.tensor([[1, 4, 5, 6]])) == 3

    def test_absent_token(self):
        with pytest.raises(
            InputError, match=r"token 'sat' \(id 6\) is not in the prompt, whose tokens are 'the', 'cat'"
        ):
            get_token_position(PLAIN, "sat", "the cat")

    def test_several_rows(self):
        with pytest.raises(InputError, match="the input has 2 rows; expected a single prompt"):
            get_token_position(PLAIN, "sat", torch.tensor([[4], [5]]))


def test_errors_are_both_ours_and_value_errors():
    with pytest.raises(HookLensError) as caught:
        to_tokens(PLAIN, "")
    assert isinstance(caught.value, ValueError)
