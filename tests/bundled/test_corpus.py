import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooklens.bundled import corpus
from hooklens.bundled.words import CAPITALS, END_OF_TEXT, NAMES, OBJECTS, PLACES, SPECIAL_TOKENS, VOCABULARY, WORDS

seeds = st.integers(min_value=0, max_value=2**32)


def pattern_of(fragment: str) -> str:
    """A regular expression that matches a template's half, whatever fills its slots."""
    escaped = re.escape(fragment.replace("{", "<").replace("}", ">")).replace(r"\ ", " ")
    return re.sub(r"<\w+>", r"\\S+", escaped)


def sentence_pattern(templates: tuple[corpus.Template, ...]) -> re.Pattern[str]:
    prompts = "|".join(pattern_of(f"{template.opening} {template.closing}") for template in templates)
    return re.compile(rf"(?:{prompts}) \S+ \.")


@pytest.fixture(scope="module")
def training_documents() -> list[str]:
    rng = random.Random(7)
    return [" ".join(corpus.sample_document(rng, room=64).words) for _ in range(20_000)]


def test_the_vocabulary_holds_each_word_once_as_one_token():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    # Random words cost at least 4 nats each only if there are more than 55 of them.
    assert 100 <= len(VOCABULARY) <= 1100
    assert not [word for word in WORDS if not re.fullmatch(r"[A-Za-z]+|[.,?!:;'-]", word)]
    assert set(SPECIAL_TOKENS).isdisjoint(WORDS)


def test_word_lists_of_slots_are_disjoint():
    """A name that is also a capital would be an answer in two tasks."""
    counts = Counter([*NAMES, *PLACES, *OBJECTS, *CAPITALS.keys(), *CAPITALS.values()])
    assert not [word for word, count in counts.items() if count > 1]


def test_pairs_are_split_without_overlap_and_every_name_is_on_both_sides():
    training = {frozenset(pair) for pair in corpus.TRAINING_PAIRS}
    held_out = {frozenset(pair) for pair in corpus.HELD_OUT_PAIRS}
    assert training.isdisjoint(held_out)
    assert len(training) + len(held_out) == len(NAMES) * (len(NAMES) - 1) // 2
    assert set().union(*training) == set().union(*held_out) == set(NAMES)


def test_templates_are_split_without_overlap():
    """A held-out sentence is new as a whole; its halves were both seen, with others."""
    training, held_out = corpus.TRAINING_TEMPLATES, corpus.HELD_OUT_TEMPLATES
    assert set(training).isdisjoint(held_out)
    assert len(training) + len(held_out) == len(corpus.OPENINGS) * len(corpus.CLOSINGS)
    for templates in (training, held_out):
        assert {template.opening for template in templates} == set(corpus.OPENINGS)
        assert {template.closing for template in templates} == set(corpus.CLOSINGS)


def test_training_text_holds_no_held_out_pair(training_documents):
    pattern = sentence_pattern(corpus.TRAINING_TEMPLATES)
    sentences = [document for document in training_documents if pattern.fullmatch(document)]
    share = corpus.TASK_SHARES["indirect_object"]
    assert len(sentences) == pytest.approx(share * len(training_documents), rel=0.05)
    allowed = {frozenset(pair) for pair in corpus.TRAINING_PAIRS}
    seen = {frozenset(word for word in sentence.split() if word in NAMES) for sentence in sentences}
    assert seen <= allowed
    assert len(seen) > 0.9 * len(allowed)


def test_training_text_holds_no_held_out_template(training_documents):
    pattern = sentence_pattern(corpus.HELD_OUT_TEMPLATES)
    assert not [document for document in training_documents if pattern.fullmatch(document)]
    # The same pattern does find the held-out prompts.
    items = corpus.held_out_indirect_objects(200, seed=0)
    assert all(pattern.fullmatch(f"{item.prompt} {item.answer} .") for item in items)


@given(seed=seeds)
def test_an_indirect_object_prompt_names_its_answer_once_and_its_twin_the_other_way_round(seed):
    rng = random.Random(seed)
    item = corpus.sample_indirect_object(rng, templates=corpus.TRAINING_TEMPLATES, pairs=corpus.TRAINING_PAIRS)
    words, twin = item.prompt.split(), item.corrupted_prompt.split()
    assert (words.count(item.answer), words.count(item.wrong)) == (1, 2)
    assert (twin.count(item.answer), twin.count(item.wrong)) == (2, 1)
    changed = [position for position, pair in enumerate(zip(words, twin, strict=True)) if len(set(pair)) == 2]
    assert len(changed) == 1
    assert set(words) <= set(WORDS)


def test_both_orders_of_names_occur():
    """ABBA (the subject is the second name) and BABA (the first) must be equally frequent."""
    items = corpus.held_out_indirect_objects(1000, seed=3)
    subject_first = sum(
        item.prompt.split().index(item.wrong) < item.prompt.split().index(item.answer) for item in items
    )
    assert 400 < subject_first < 600


@given(seed=seeds)
def test_a_fact_prompt_and_its_twin_differ_in_one_word_and_have_true_answers(seed):
    item = corpus.sample_fact(random.Random(seed))
    pairs = {frozenset(pair) for pair in CAPITALS.items()}
    for prompt, answer in ((item.prompt, item.answer), (item.corrupted_prompt, item.wrong)):
        (asked,) = [word for word in prompt.split() if any(word in pair for pair in pairs)]
        assert frozenset({asked, answer}) in pairs
    words, twin = item.prompt.split(), item.corrupted_prompt.split()
    assert sum(a != b for a, b in zip(words, twin, strict=True)) == 1


def test_all_facts_ask_every_country_in_every_phrasing():
    items = corpus.all_facts()
    assert len({item.prompt for item in items}) == len(items) == len(CAPITALS) * len(corpus.FACT_PHRASINGS)
    assert ("The capital of France is", "Paris") in {(item.prompt, item.answer) for item in items}
    assert all(item.answer != item.wrong for item in items)


@given(seed=seeds, period=st.integers(1, 40), length=st.integers(0, 100))
def test_repeats_have_their_period(seed, period, length):
    words = corpus.sample_repeats(random.Random(seed), period=period, length=length)
    assert len(words) == length
    assert words[period:] == words[: max(0, length - period)]
    assert set(words) <= set(WORDS)


@given(seed=seeds, length=st.integers(1, 256))
def test_rows_start_with_end_of_text_and_depend_on_the_seed_only(seed, length):
    row = corpus.sample_row(random.Random(seed), length=length)
    assert len(row.words) == len(row.weights) == length
    assert row.words[0] == END_OF_TEXT
    assert row == corpus.sample_row(random.Random(seed), length=length)
    assert set(row.words) <= {END_OF_TEXT, *WORDS}


@given(seed=seeds)
def test_answers_and_repeated_words_weigh_more_than_random_ones(seed):
    document = corpus.sample_document(random.Random(seed), room=64)
    words = document.words
    marked = [position for position, weight in enumerate(document.weights) if weight > corpus.RANDOM_WORD_WEIGHT]
    marked_weights = {document.weights[position] for position in marked}
    if marked[-1] == len(words) - 2:
        answers = {*NAMES, *CAPITALS.keys(), *CAPITALS.values()}
        assert {words[position] for position in marked} <= answers
        assert marked_weights == {corpus.ANSWER_WEIGHT}
        assert all(words[position + 1] == "." for position in marked)
    else:
        period = marked[0] - 1
        assert marked_weights == {corpus.REPEATED_WORD_WEIGHT}
        assert marked == list(range(period + 1, len(words)))
        assert all(words[position] == words[position - period] for position in marked)


def test_periods_vary():
    """One fixed period would let a model copy by position in place of by content."""
    rng = random.Random(0)
    periods = Counter()
    for _ in range(4000):
        words = corpus.sample_document(rng, room=64).words
        for period in range(2, 33):
            if len(words) >= 2 * period and words[period:] == words[:-period]:
                periods[period] += 1
                break
    assert set(periods) == set(range(2, 33))
