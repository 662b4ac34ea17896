"""Continuations behind a prefix that is text, against the whole text, for tokenizers of every kind."""

import math
from itertools import product

import pytest
import torch

from hooklens import edits
from hooklens.errors import InputError
from hooklens.evaluation import multiple_choice, score_continuations
from hooklens.evaluation.prefix import encode_continuations, encode_in_place, extend_prefix, make_prefix, run_behind
from tests.evaluation.networks import score_alone
from tests.slow_cases import slow_but
from tests.text_models import reader_of
from tests.tokens.kinds import KINDS, TEMPLATES

PREFIX = "the cat sat\nA: yes"
CONTINUATIONS = ["\nno", "\nno on the mat", " world", ", hello"]


def encode_open(model, text):
    """The tokens of a text without the EOS that a tokenizer puts behind it."""
    ids = model.to_tokens(text)[0].tolist()
    return ids[:-1] if ids[-1] == model.tokenizer.eos_token_id else ids


# Each kind with two templates, of which one puts a token behind the text.
BY_TURNS = [
    (kind, template)
    for number, kind in enumerate(KINDS)
    for template in (("none", "EOS") if number % 2 else ("BOS", "both"))
]


@pytest.mark.parametrize(("kind", "template"), slow_but(product(KINDS, TEMPLATES), BY_TURNS))
def test_continuations_score_as_in_the_whole_text(kind, template):
    """They were encoded alone: behind "A: yes\\n" the tokens of " no" were scored in the place of "no"."""
    model = reader_of(kind, template)
    for prefix, texts in (
        (PREFIX, CONTINUATIONS),
        ("the cat sat\nA: yes\n", ["no", "no on the mat", "yes"]),
        # The space and the word behind it make a token together in most kinds.
        ("the cat sat\nA: ", ["yes", "no", " no"]),
    ):
        table = score_continuations(model, prefix, texts, progress=False)
        bare = prefix.rstrip()
        starts = {len(encode_open(model, prefix)), len(encode_open(model, bare))}
        for text, (_, row) in zip(texts, table.iterrows(), strict=True):
            whole = encode_open(model, prefix + text)
            begun = whole[: len(whole) - row["n_tokens"]]
            assert begun + row["tokens"] == whole
            # All of them begin at one place.
            starts &= {len(begun)}
            assert starts
            assert row["continuation"] == text
            assert row["token_logprobs"] == pytest.approx(score_alone(model, begun, row["tokens"]), abs=1e-10)


ITEMS = [
    {"question": "\nA: yes\nB:", "choices": [" no", " yes", " the cat"]},
    {"question": "\nA: no\n", "choices": ["no", "yes"]},
    {"question": "\nA: ", "choices": ["no", "yes"]},
]


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: repr(item["question"]))
@pytest.mark.parametrize(("kind", "template"), slow_but(product(KINDS, TEMPLATES), BY_TURNS))
def test_choices_and_questions_score_as_in_the_whole_text(kind, template, item):
    """Questions behind a prefix and choices behind a question were encoded alone, which changed the answers."""
    model = reader_of(kind, template)
    shared, question, choices = "the cat sat", item["question"], item["choices"]
    asked = shared + question
    wholes = [encode_open(model, asked + choice) for choice in choices]
    borders = [encode_open(model, asked), encode_open(model, asked.rstrip())]
    borders = [begun for begun in borders if all(whole[: len(begun)] == begun for whole in wholes)]
    for edit in ((), (edits.Scale("hook_embed", 2.0),)):
        if not borders:
            # In a kind whose tokens run over words.
            with pytest.raises(InputError, match="does not go on"):
                multiple_choice(model, [item], prefix=shared, edits=edit, progress=False)
            continue
        expected = [math.fsum(score_alone(model, borders[0], whole[len(borders[0]) :], edit)) for whole in wholes]
        for prefix, text in ((shared, question), (None, asked)):
            table = multiple_choice(model, [{**item, "question": text}], prefix=prefix, edits=edit, progress=False)
            assert table["logprobs"][0] == pytest.approx(expected, abs=1e-10)


def test_ids_and_text_may_be_mixed_where_the_border_moves():
    model = reader_of("byte-level BPE", "BOS")
    ids = model.to_tokens("the cat ")[0].tolist()
    mat = encode_open(model, "the cat mat")[-2:]
    for prefix in ("the cat ", ids):
        table = score_continuations(model, prefix, ["sat", mat], progress=False)
        assert table["tokens"][0] == encode_open(model, "the cat sat")[len(ids) - 1 :]
        assert table["tokens"][1] == [ids[-1], *mat]
        assert table["token_logprobs"][1] == pytest.approx(score_alone(model, ids[:-1], table["tokens"][1]), abs=1e-10)


@pytest.mark.parametrize("edit", [(), (edits.Scale("hook_embed", 2.0),), (edits.Mean("blocks.0.hook_mlp_out"),)])
def test_a_prefix_that_was_run_moves_its_end_without_changing(edit):
    model = reader_of("byte-level BPE", "BOS")
    prefix = make_prefix(model, "the cat ", edits=edit)
    before = None if prefix.cache is None else prefix.cache.entries[0].past_keys.clone()
    start, [row] = encode_continuations(model, prefix, ["sat"])
    assert start.cache is None
    moved = run_behind(model, prefix, start)
    expected = make_prefix(model, "the cat", edits=edit)
    assert torch.equal(moved.tokens, expected.tokens)
    assert moved.tokens[0].tolist() + row == encode_open(model, "the cat sat")
    extended = run_behind(model, prefix, extend_prefix(model, prefix, "sat on"))
    assert extended.tokens[0].tolist() == encode_open(model, "the cat sat on")
    assert extended.text == "the cat sat on"
    if expected.cache is not None:
        torch.testing.assert_close(moved.cache.last_logits, expected.cache.last_logits, rtol=0, atol=1e-10)
        assert torch.equal(prefix.cache.entries[0].past_keys, before)
    same, _ = encode_continuations(model, prefix, ["\n"])
    assert same is prefix
    assert prefix.cache is None or run_behind(model, None, same) is prefix
    with pytest.raises(InputError, match=r"'sat' does not go on from the tokens before it.*leave the space at the end"):
        encode_in_place(model, prefix, "sat")


def test_what_begins_inside_a_token_is_refused_all_at_once():
    model = reader_of("Prepend", "BOS")
    text = r"(?s)continuation 0: 's' does not go on from the tokens before it: .*continuation 2: '' has no token"
    with pytest.raises(InputError, match=text):
        score_continuations(model, "the cat", ["s", " sat", ""], progress=False)
    with pytest.raises(InputError, match=r"^'s' does not go on"):
        extend_prefix(model, make_prefix(model, "the cat"), "s")
