"""Penalties, the caller's processors and warpers: their order, and what they are shown."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import (
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hooklens.generation.choosing.processors import FrequencyPenalty, RowIds, build_pipeline
from hooklens.generation.options import GenerationOptions
from tests.generation.networks import RAGGED, left_pad, pair, with_padding_id


@given(ids=st.lists(st.integers(0, 6), min_size=1, max_size=12), penalty=st.floats(-2, 2))
def test_frequency_penalty_takes_off_a_logit_for_each_occurrence(ids, penalty):
    scores = torch.linspace(-1, 1, 7)[None]
    found = FrequencyPenalty(penalty)(torch.tensor([ids]), scores)
    counts = Counter(ids)
    expected = [float(scores[0, token]) - penalty * counts[token] for token in range(7)]
    # One float32 product and one sum.
    assert found[0].tolist() == pytest.approx(expected, abs=1e-5)


def test_order_is_that_of_transformers():
    mine = NoRepeatNGramLogitsProcessor(2)
    pipeline = build_pipeline(
        GenerationOptions(
            temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.3, logits_processor=[mine]
        )
    )
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.3),
            mine,
            TemperatureLogitsWarper(0.7),
            TopKLogitsWarper(20),
            TopPLogitsWarper(0.9),
            MinPLogitsWarper(0.02),
        ]
    )
    ids = torch.randint(0, 50, (4, 30))
    scores = torch.randn(4, 50)
    assert torch.equal(pipeline(scores, RowIds(padded=ids, padding=None)), theirs(ids, scores))


def test_greedy_generation_runs_no_warper():
    pipeline = build_pipeline(GenerationOptions(do_sample=False, temperature=0.5, top_k=3, top_p=0.5))
    assert pipeline.reading_scores == ()


def test_top_p_really_filters():
    """curated-transformers: inside its generator top-p kept every token."""
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80]])
    with torch.no_grad():
        probabilities = model(ids)[0, -1].softmax(-1).sort(descending=True)
    kept = int((probabilities.values.cumsum(0) < 0.6).sum()) + 1
    allowed = set(probabilities.indices[:kept].tolist())
    drawn = model.generate(ids, num_return_sequences=300, max_new_tokens=1, top_p=0.6, seed=0, verbose=False)
    free = model.generate(ids, num_return_sequences=300, max_new_tokens=1, seed=0, verbose=False)
    assert set(drawn[:, -1].tolist()) <= allowed
    assert not set(free[:, -1].tolist()) <= allowed


def test_processors_see_rows_without_padding():
    model, _ = pair()
    seen = []

    def watch(ids, scores):
        assert len(ids) == len(scores)
        seen.extend(row[:6].tolist() for row in ids)
        return scores

    prompts = [*RAGGED, [1, 2, 3]]
    with_padding_id(model).generate(
        left_pad(prompts)[0], logits_processor=[watch], do_sample=False, max_new_tokens=1, verbose=False
    )
    assert sorted(seen) == sorted(prompts)


@pytest.mark.parametrize("keywords", [{"repetition_penalty": 2.0}, {"freq_penalty": 1.5}], ids=str)
def test_penalised_rows_are_the_same_alone_and_in_a_ragged_batch(keywords):
    """transformers counts padding as a token of the row."""
    model, _ = pair()
    padded = with_padding_id(model)
    keywords = {**keywords, "do_sample": False, "max_new_tokens": 10, "return_type": "output", "verbose": False}
    together = padded.generate(left_pad(RAGGED)[0], **keywords)
    for prompt, new in zip(RAGGED, together.new_tokens, strict=True):
        assert padded.generate(torch.tensor([prompt]), **keywords).new_tokens[0].tolist() == new.tolist()


def test_a_large_frequency_penalty_repeats_nothing():
    model, _ = pair()
    tokens = model.generate(torch.tensor([[5, 17]]), freq_penalty=1e4, max_new_tokens=40, verbose=False)[0].tolist()
    assert len(set(tokens)) == len(tokens)
