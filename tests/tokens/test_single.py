import pytest
import torch

from hooklens.errors import InputError
from hooklens.tokens import get_token_position, to_single_str_token, to_single_token
from tests.tokens.tokenizers import BYTES, CAT, PLAIN, THE, WITH_BOS


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
