"""Words that a vocabulary lacks."""

import copy

import pytest

from hooklens.errors import InputError, UnknownTokenWarning
from hooklens.tokens import read_tokens, to_single_token, to_tokens, unknown_token_id
from hooklens.tokens.unknown import unknown_pieces
from tests.tokens.tokenizers import ALL_SPECIAL, BYTES, PAD_IS_UNKNOWN, PLAIN, WITH_BOS, word_tokenizer


class Slow:
    """A tokenizer that does not tell where in the text its tokens stand."""

    is_fast = False

    def __init__(self, inner):
        self.inner = inner

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def __len__(self):
        return len(self.inner)

    def __call__(self, text, **options):
        return self.inner(text, **options)


def test_only_an_id_of_its_own_stands_for_unknown_words():
    assert unknown_token_id(PLAIN) == 3
    assert unknown_token_id(PAD_IS_UNKNOWN) is None
    assert unknown_token_id(BYTES) is None
    as_bos = copy.deepcopy(PLAIN)
    as_bos.bos_token = "<unk>"
    assert unknown_token_id(as_bos) is None


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS, Slow(PLAIN)])
def test_pieces(tokenizer):
    assert unknown_pieces(tokenizer, ["the zebra <unk>", " lion", "zebra"]) == ["zebra", "lion"]
    assert unknown_pieces(tokenizer, ["the cat", ""]) == []
    assert unknown_pieces(tokenizer, []) == []


@pytest.mark.filterwarnings("error")
def test_no_warning_without_unknown_words():
    to_tokens(PLAIN, ["the cat", "<unk> sat"])
    to_tokens(PAD_IS_UNKNOWN, "the zebra")
    to_tokens(BYTES, "zebra")


def test_a_tokenizer_without_places_names_them_too():
    with pytest.warns(UnknownTokenWarning, match="the tokenizer's vocabulary lacks 'zebra': "):
        to_tokens(Slow(PLAIN), "the zebra <unk>")


def test_continuations_warn_too():
    with pytest.warns(UnknownTokenWarning, match="the tokenizer's vocabulary lacks 'zebra': "):
        assert read_tokens(" the zebra", WITH_BOS, d_vocab=9, past=[[1, 5]]).ids.tolist() == [[4, 3]]
    with pytest.raises(InputError, match=r"the text holds tokens that the model lacks: 'mat' \(id 8\)"):
        read_tokens(" mat", WITH_BOS, d_vocab=8, past=[[1, 5]])


@pytest.mark.parametrize("tokenizer", [PLAIN, Slow(PLAIN)])
def test_no_single_token_is_made_of_an_unknown_word(tokenizer):
    """It was the unknown token, whose logit a metric then measured."""
    text = r"' zebra' is not in the tokenizer's vocabulary: it becomes the unknown token '<unk>' \(id 3\)"
    with pytest.raises(InputError, match=text):
        to_single_token(tokenizer, " zebra")
    assert to_single_token(tokenizer, "<unk>") == to_single_token(tokenizer, " <unk>") == 3


def test_an_unknown_word_is_no_remedy():
    with pytest.raises(InputError, match=r"expected a text that is a single token\.$"):
        to_single_token(word_tokenizer(**ALL_SPECIAL), "the zebra")
