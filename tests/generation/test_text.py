"""Text in pieces, and stop strings, with tokens smaller than characters."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hooklens.generation.text import StopTexts, TextPieces, decode_behind, decode_plain, find_context
from tests.generation.networks import reader
from tests.tokens.kinds import KINDS, make_tokenizer


def byte_tokenizer():
    """One token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


BYTES = byte_tokenizer()


@given(prompt=st.text("aé漢🙂 ", min_size=1, max_size=6), new=st.text("aé漢🙂 ", min_size=1, max_size=12))
def test_pieces_sum_to_the_text_and_are_whole_characters(prompt, new):
    ids = BYTES(new)["input_ids"]
    pieces = TextPieces(BYTES, BYTES(prompt)["input_ids"])
    shown = [pieces.push(token, last=index == len(ids) - 1) for index, token in enumerate(ids)]
    assert "".join(shown) == new
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


def test_a_row_that_ends_inside_a_character_shows_it_as_broken():
    ids = BYTES("a漢")["input_ids"]
    pieces = TextPieces(BYTES, [])
    shown = [pieces.push(token, last=index == 2) for index, token in enumerate(ids[:3])]
    assert shown == ["a", "", "\N{REPLACEMENT CHARACTER}"]


@given(text=st.text("ab🙂", min_size=1, max_size=30), stop=st.text("ab🙂", min_size=1, max_size=4))
def test_stop_strings_are_found_with_the_token_that_completes_them(text, stop):
    ids = BYTES(text)["input_ids"]
    texts = StopTexts(BYTES, [stop])
    found = next((n for n in range(1, len(ids) + 1) if texts.occurs_in(ids[:n])), None)
    expected = next((n for n in range(1, len(ids) + 1) if stop in decode_plain(BYTES, ids[:n])), None)
    assert found == expected


def test_text_leaves_out_special_tokens():
    tokenizer = reader().tokenizer
    ids = tokenizer("Mary went to")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert decode_plain(tokenizer, ids) == "Mary went to"


@pytest.mark.parametrize("stop", ["went", ["no such", "went to"]])
def test_generation_ends_with_a_stop_string(stop):
    model = reader()
    words = iter(model.to_tokens("Mary went to the store", prepend_bos=False)[0].tolist())

    def dictate(ids, scores):
        return scores.new_full(scores.shape, -1e9).index_fill(1, ids.new_tensor([next(words)]), 0.0)

    out = model.generate("John and", stop_strings=stop, logits_processor=[dictate], return_type="output", verbose=False)
    assert out.text == ["John and Mary went" if stop == "went" else "John and Mary went to"]
    assert out.finish_reasons == ["stop_string"]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data())
def test_pieces_sum_to_the_text_whatever_special_tokens_stand_between(kind, data):
    """Behind an EOS the space of the next word was lost: a token was decoded with special tokens alone before it."""
    tokenizer = make_tokenizer(kind)
    words = tokenizer(" the cat\nno on world é", add_special_tokens=False).input_ids
    token = st.one_of(st.sampled_from([1, 2, 3]), st.sampled_from(words))
    prompt, new = (data.draw(st.lists(token, min_size=n, max_size=14)) for n in (0, 1))
    pieces = TextPieces(tokenizer, prompt)
    shown = "".join(pieces.push(one, last=index == len(new) - 1) for index, one in enumerate(new))
    whole, start = decode_plain(tokenizer, prompt + new), decode_plain(tokenizer, prompt)
    if "\N{REPLACEMENT CHARACTER}" not in whole:
        assert shown == whole[len(start) :] == decode_behind(tokenizer, prompt, new)


def test_a_word_behind_a_special_token_keeps_its_space():
    tokenizer = make_tokenizer("Prepend, byte fallback", "BOS")
    prompt = tokenizer("the cat</s>").input_ids
    [word] = tokenizer("sat", add_special_tokens=False).input_ids
    assert TextPieces(tokenizer, prompt).push(word) == " sat"


def test_a_character_that_the_prompt_leaves_open_comes_whole():
    ids = BYTES("漢")["input_ids"]
    assert decode_behind(BYTES, ids[:2], ids[2:]) == "漢"
    assert TextPieces(BYTES, ids[:2]).push(ids[2]) == "漢"


def test_a_stop_string_may_begin_with_the_space_of_the_first_new_word():
    """The new text was decoded alone, where its first space is lost."""
    tokenizer = make_tokenizer("Metaspace always", "BOS")
    [word] = tokenizer("sat", add_special_tokens=False).input_ids
    before = find_context(tokenizer, tokenizer("the cat").input_ids)
    assert StopTexts(tokenizer, [" sat"]).occurs_in([word], before=before)
    assert not StopTexts(tokenizer, ["t sat"]).occurs_in([word], before=before)
