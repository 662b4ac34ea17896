import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hooklens.bundled import BUNDLED
from hooklens.bundled.architectures import build_model
from hooklens.bundled.corpus import sample_document
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.bundled.words import END_OF_TEXT, PAD, UNKNOWN, VOCABULARY

tokenizer = build_tokenizer(n_ctx=256)


def test_ids_are_places_in_the_vocabulary():
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}
    assert (tokenizer.bos_token, tokenizer.eos_token) == (END_OF_TEXT, END_OF_TEXT)
    assert (tokenizer.pad_token, tokenizer.unk_token) == (PAD, UNKNOWN)
    assert tokenizer.model_max_length == 256


def test_every_word_is_one_token_and_the_bos_comes_first_once():
    for i, word in enumerate(VOCABULARY):
        assert tokenizer(word)["input_ids"] == [0, i]
        assert tokenizer(word, add_special_tokens=False)["input_ids"] == [i]


@given(seed=st.integers(0, 2**32), room=st.integers(8, 128))
def test_text_of_the_corpus_survives_the_round_trip(seed, room):
    words = sample_document(random.Random(seed), room=room).words
    text = " ".join(words)
    ids = tokenizer(text)["input_ids"]
    assert ids == [0, *(VOCABULARY.index(word) for word in words)]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_punctuation_may_touch_the_word():
    apart = "When Mary and John went to the store , John gave a drink to Mary . Why ? !"
    touching = "When Mary and John went to the store, John gave a drink to Mary. Why?!"
    assert tokenizer(touching)["input_ids"] == tokenizer(apart)["input_ids"]
    assert tokenizer("  Mary\n")["input_ids"] == tokenizer("Mary")["input_ids"]


def test_unknown_words_become_the_unknown_token():
    assert tokenizer.convert_ids_to_tokens(tokenizer("Mary xylophone .")["input_ids"]) == [
        END_OF_TEXT,
        "Mary",
        UNKNOWN,
        ".",
    ]


def test_padding_is_masked_and_no_token_types_are_made():
    encoded = tokenizer(["Mary", "Mary and John"], padding=True)
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert encoded["attention_mask"] == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert encoded["input_ids"][0][2:] == [VOCABULARY.index(PAD)] * 2


@pytest.mark.parametrize("name", BUNDLED)
def test_auto_tokenizer_loads_the_same_tokenizer_beside_every_config(name, tmp_path):
    """AutoTokenizer reads config.json too and may pick the family's own class, which drops the BOS rule."""
    build_model(name).config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "When Mary and John went to the store, John gave a drink to"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == tokenizer.decode(tokenizer(text)["input_ids"])
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert set(loaded(text)) == {"input_ids", "attention_mask"}
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id, loaded.unk_token_id) == (0, 0, 1, 2)
