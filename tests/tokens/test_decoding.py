import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.tokens import to_single_str_token, to_str_tokens, to_string, to_tokens
from tests.tokens.kinds import DROPS_SPACES, KINDS, make_tokenizer
from tests.tokens.tokenizers import BYTES, PLAIN, WITH_BOS


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
    def test_one_string_per_token(self, text):
        ids = to_tokens(BYTES, text, prepend_bos=True)[0]
        pieces = to_str_tokens(BYTES, text, prepend_bos=True)
        assert pieces == to_str_tokens(BYTES, ids) == [BYTES.decode([token]) for token in ids]
        if text.isascii():
            assert "".join(pieces) == "<|end|>" + text

    def test_parts_of_a_character_show_as_the_replacement_character(self):
        assert to_str_tokens(BYTES, "é") == ["\ufffd", "\ufffd"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_tokens_of_different_text_show_different_strings(self, kind):
        """`world` and `▁world` both showed as "world"; the space of a word is a part of its token's string."""
        tokenizer = make_tokenizer(kind)
        ids = list(range(4, len(tokenizer)))
        strings = to_str_tokens(tokenizer, ids)
        for token, string in zip(ids, strings, strict=True):
            piece = tokenizer.convert_ids_to_tokens(token)
            if "▁" in piece:
                assert string == piece.replace("▁", " ")
            elif not piece.startswith("<0x"):
                assert string == tokenizer.decode([token])
            assert to_single_str_token(tokenizer, token) == string
        if kind not in DROPS_SPACES:
            spaced = " the cat sat on the mat" if strings != [one.lstrip() for one in strings] else "the cat"
            shown = "".join(to_str_tokens(tokenizer, "the cat sat on the mat"))
            assert shown in (spaced, spaced[1:])

    def test_several_prompts(self):
        expected = [["the", "cat"], ["sat"]]
        assert to_str_tokens(PLAIN, ["the cat", "sat"]) == expected
        assert to_str_tokens(PLAIN, [[4, 5], [6]]) == expected
        assert to_str_tokens(PLAIN, torch.tensor([[4, 5], [6, 0]])) == [["the", "cat"], ["sat", "<pad>"]]
        assert to_str_tokens(WITH_BOS, "the", prepend_bos=False) == ["the"]

    def test_empty_prompt(self):
        with pytest.raises(InputError, match="empty prompt: prompt 1 of 2"):
            to_str_tokens(PLAIN, ["the", ""])
