"""Tests of hooklens.tokens.continuation: text that goes on, against encoding the whole text and slicing."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.tokens import encode_behind, find_text_before, read_tokens, without_last_spaces
from tests.tokens.kinds import DROPS_SPACES, KINDS, TEMPLATES, make_tokenizer
from tests.tokens.tokenizers import BYTES, WITH_BOTH

PIECES = ["the", "cat", "s", " ", " sat", "\n", "no", "yes", ":", " A", "world", ",", "é", "on"]
TEXT = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map("".join)
BIG = 10**6


def encode_whole(tokenizer, text, **options):
    return read_tokens(text, tokenizer, d_vocab=BIG, **options).ids[0].tolist()


@pytest.mark.filterwarnings("ignore::hooklens.errors.UnknownTokenWarning")
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(prefix=TEXT, text=TEXT, closed=st.booleans())
def test_text_that_goes_on_is_what_follows_in_the_whole(kind, template, prefix, text, closed):
    """It was encoded alone: behind "A: yes\\n" a Llama tokenizer made " no" of "no"."""
    tokenizer = make_tokenizer(kind, template)
    if kind in DROPS_SPACES:
        # Ids do not tell that their text ended in a space.
        prefix = prefix.rstrip() or "the"
    try:
        past = encode_whole(tokenizer, prefix, closed=False)
        whole = encode_whole(tokenizer, prefix + text, closed=closed)
    except InputError:
        # Nothing but spaces, which some tokenizers drop.
        return
    opened = encode_whole(tokenizer, prefix + text, closed=False)
    if opened[: len(past)] != past:
        with pytest.raises(InputError, match="does not go on from the tokens before it"):
            encode_whole(tokenizer, text, past=[past], closed=closed)
    elif len(opened) == len(past):
        with pytest.raises(InputError, match="empty prompt"):
            encode_whole(tokenizer, text, past=[past], closed=closed)
    else:
        assert past + encode_whole(tokenizer, text, past=[past], closed=closed) == whole
        known = find_text_before(tokenizer, past, text=prefix)
        assert past + encode_behind(tokenizer, known, [text])[0] == opened


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in DROPS_SPACES])
@settings(max_examples=20)
@given(data=st.data())
def test_ids_that_no_text_has_are_gone_on_from_by_their_text(kind, data):
    """Sampled ids are seldom those that the tokenizer makes of their text; the text behind is still what it adds."""
    tokenizer = make_tokenizer(kind, "BOS")
    ids = data.draw(st.lists(st.integers(4, len(tokenizer) - 1), min_size=1, max_size=6))
    past = [tokenizer.bos_token_id, *ids]
    text = " the cat"
    [row] = encode_behind(tokenizer, find_text_before(tokenizer, past), [text])
    if row is None:
        with pytest.raises(InputError, match="does not go on from the tokens before it"):
            encode_whole(tokenizer, text, past=[past])
        return
    assert encode_whole(tokenizer, text, past=[past]) == row
    assert tokenizer.decode(past + row) == tokenizer.decode(past) + text


@pytest.mark.parametrize("template", ["none", "BOS"])
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_before_the_text_are_hard_borders(kind, template):
    """A conversation of several parts, each closed by an EOS: the text goes on behind the last one."""
    tokenizer = make_tokenizer(kind, template)
    prefix = "the cat</s>no on"
    past = encode_whole(tokenizer, prefix)
    for before, text in ((prefix, " the mat"), (prefix + " </s>", "the mat"), ("</s>", "no")):
        past = encode_whole(tokenizer, before)
        assert past + encode_whole(tokenizer, text, past=[past]) == encode_whole(tokenizer, before + text)


def test_a_bos_is_never_put_in_the_middle():
    past = encode_whole(WITH_BOTH, "the cat", closed=False)
    assert past == [1, 4, 5]
    for prepend_bos in (None, False):
        assert encode_whole(WITH_BOTH, " sat", past=[past], prepend_bos=prepend_bos) == [6, 2]
        assert encode_whole(WITH_BOTH, " sat", past=[past], prepend_bos=prepend_bos, closed=False) == [6]
    with pytest.raises(InputError, match="prepend_bos=True: the text goes on from tokens that stand before it"):
        encode_whole(WITH_BOTH, " sat", past=[past], prepend_bos=True)


def test_every_row_goes_on_from_its_own_or_all_from_one():
    first, second = encode_whole(BYTES, "the cat"), encode_whole(BYTES, "Paris and")
    batch = read_tokens([" sat", " the cat"], BYTES, d_vocab=BIG, past=[first, second])
    rows = [row[shows.bool()].tolist() for row, shows in zip(batch.ids, batch.attention_mask, strict=True)]
    assert first + rows[0] == encode_whole(BYTES, "the cat sat")
    assert second + rows[1] == encode_whole(BYTES, "Paris and the cat")
    shared = read_tokens([" sat", " on"], BYTES, d_vocab=BIG, past=[first]).ids
    assert len(shared) == 2


def test_ids_that_the_tokenizer_lacks_stand_for_no_text():
    """Models often have more embeddings than their tokenizer has tokens."""
    with pytest.raises(InputError, match="token id 999 is not in the tokenizer's vocabulary"):
        read_tokens(" sat", BYTES, d_vocab=BIG, past=[[5, 999]])
    assert read_tokens([[7]], BYTES, d_vocab=BIG, past=[[5, 999]]).ids.tolist() == [[7]]


def test_both_tokenisations_are_told_of_all_texts():
    past = encode_whole(BYTES, "the cat ")
    text = (
        r"(?s)prompt 0: 'sat' does not go on from the tokens before it: after \d+ tokens that agree they are ' ' "
        r"\(ids \[\d+\]\), and encoded together with the text ' sat' \(ids \[\d+\]\); leave the space at the end of "
        r"what stands before out.*prompt 2: 'mat'"
    )
    with pytest.raises(InputError, match=text):
        read_tokens(["sat", "\n", "mat"], BYTES, d_vocab=BIG, past=[past])
    with pytest.raises(InputError, match="end what stands before where a word ends"):
        read_tokens("t", BYTES, d_vocab=BIG, past=[encode_whole(BYTES, "the ca")])


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_at_the_end_move_to_what_follows(kind):
    tokenizer = make_tokenizer(kind, "BOS")
    ids = encode_whole(tokenizer, "A: ")
    whole = encode_whole(tokenizer, "A: yes")
    moved = without_last_spaces(tokenizer, find_text_before(tokenizer, ids, text="A: "))
    if moved is None:
        # The space is part of a token with what stands before it, inside the whole as well.
        assert whole[: len(ids)] == ids
    else:
        before, spaces = moved
        assert (before.text, spaces) == ("A:", " ")
        [row] = encode_behind(tokenizer, before, [" yes"])
        assert before.ids + row == whole
    assert without_last_spaces(tokenizer, find_text_before(tokenizer, ids[:1])) is None
