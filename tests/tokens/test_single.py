import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hooklens.errors import InputError
from hooklens.tokens import get_token_position, to_single_str_token, to_single_token, to_string
from tests.annotations import unchecked
from tests.tokens.kinds import DROPS_SPACES, KINDS, make_tokenizer
from tests.tokens.tokenizers import BYTES, CAT, PLAIN, THE, WITH_BOS

WRONG = [True, np.True_, 4.0, np.float32(4), None, b"4", [[[4]]], torch.tensor(4.0), torch.tensor([4.0, 5.0])]


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

    @pytest.mark.parametrize("token", [CAT, np.int64(CAT), np.uint8(CAT), torch.tensor(CAT), torch.tensor(CAT).int()])
    def test_every_kind_of_integer(self, token):
        assert to_single_str_token(PLAIN, token) == to_string(PLAIN, token) == "cat"
        assert get_token_position(PLAIN, token, "the cat") == 1

    @pytest.mark.parametrize("token", WRONG)
    def test_what_is_no_id(self, token):
        """True was the token 1, and floats reached the tokenizer."""
        with unchecked():
            for read in (
                lambda: to_single_str_token(PLAIN, token),
                lambda: get_token_position(PLAIN, token, "the cat"),
            ):
                with pytest.raises(InputError, match=r"the token is .*; expected a token id, an integer"):
                    read()
            with pytest.raises(InputError):
                to_string(PLAIN, token)

    @pytest.mark.parametrize("token", [9, 2**40, -1, np.int64(9), torch.tensor(-3)])
    def test_ids_that_the_tokenizer_lacks(self, token):
        text = rf"token ids? {int(token)} is not in the tokenizer's vocabulary; its ids are 0 to 8"
        with pytest.raises(InputError, match=text):
            to_single_str_token(PLAIN, token)
        with pytest.raises(InputError, match=text):
            get_token_position(PLAIN, token, "the cat")
        with pytest.raises(InputError, match=text if token > 0 else "token ids are negative: "):
            to_string(PLAIN, token)

    def test_all_ids_that_the_tokenizer_lacks_are_named(self):
        with pytest.raises(InputError, match=r"token ids \[9, 11\] are not in the tokenizer's vocabulary"):
            to_string(PLAIN, [[4, 11], [9, 5]])

    def test_ids_of_added_tokens_may_leave_gaps(self):
        """Their ids can be beyond the number of tokens."""
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
        )
        assert len(tokenizer) == 2
        assert to_single_str_token(tokenizer, 7) == "b"
        with pytest.raises(InputError, match="token id 5 is not in the tokenizer's vocabulary"):
            to_single_str_token(tokenizer, 5)

    @pytest.mark.parametrize("text", [None, 4, 2.0, b"cat", ["cat"]])
    def test_what_is_no_text(self, text):
        with unchecked(), pytest.raises(InputError, match="to_single_token takes a text, got "):
            to_single_token(PLAIN, text)


class TestGetTokenPosition:
    def test_positions(self):
        text = "the cat sat the"
        assert get_token_position(PLAIN, "the", text) == 0
        assert get_token_position(PLAIN, THE, text, mode="last") == 3
        assert get_token_position(PLAIN, "cat", text, prepend_bos=True) == 2
        assert get_token_position(PLAIN, "sat", torch.tensor([1, 4, 5, 6])) == 3
        assert get_token_position(PLAIN, "sat", torch.tensor([[1, 4, 5, 6]])) == 3

    @pytest.mark.parametrize("mode", ["middle", None, 1, ["first"]])
    def test_unknown_mode(self, mode):
        with unchecked(), pytest.raises(InputError, match=r"mode is .*; expected 'first' or 'last'"):
            get_token_position(PLAIN, "the", "the cat", mode=mode)

    def test_unknown_word(self):
        """It was found where another unknown word stands."""
        with pytest.raises(InputError, match="'lion' is not in the tokenizer's vocabulary"):
            get_token_position(PLAIN, "lion", "the zebra")
        assert get_token_position(PLAIN, "<unk>", "the zebra") == 1

    def test_absent_token(self):
        with pytest.raises(
            InputError, match=r"token 'sat' \(id 6\) is not in the prompt, whose tokens are 'the', 'cat'"
        ):
            get_token_position(PLAIN, "sat", "the cat")

    def test_several_rows(self):
        with pytest.raises(InputError, match="the input has 2 rows; expected a single prompt"):
            get_token_position(PLAIN, "sat", torch.tensor([[4], [5]]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_and_its_string_name_each_other(kind):
    """With Llama's tokenizers "world" gave the token of " world", and " world" none."""
    tokenizer = make_tokenizer(kind, "BOS")
    words = ["the", "no", "cat", "world", " the", " no", " sat", " world"]
    found = {}
    for word in words:
        try:
            found[word] = to_single_token(tokenizer, word)
        except InputError as error:
            found[word] = None
            assert "expected a text that is a single token" in str(error)  # noqa: PT017
    spelled = {tokenizer.convert_ids_to_tokens(token): token for token in range(4, len(tokenizer))}
    for word, token in found.items():
        names = {word.replace(" ", "▁"), word.replace(" ", "Ġ")}
        if kind in DROPS_SPACES:
            names = {word.strip()}
        expected = {spelled[name] for name in names if name in spelled}
        assert ({token} if token is not None else set()) == expected
        if token is not None and kind not in DROPS_SPACES:
            assert to_single_str_token(tokenizer, token) == word
    assert sum(token is not None for token in found.values()) >= 2


def test_the_token_with_the_space_is_named_where_there_is_no_other():
    tokenizer = make_tokenizer("Metaspace always")
    assert to_single_str_token(tokenizer, to_single_token(tokenizer, " cats")) == " cats"
    with pytest.raises(InputError, match=r"'hello' is not the token ' hello'; expected a text .* ' hello' is one"):
        to_single_token(tokenizer, "hello")
