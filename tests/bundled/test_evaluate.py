import math

import pytest
import torch

from hooklens.bundled import evaluate
from hooklens.bundled.corpus import all_facts, held_out_indirect_objects
from hooklens.bundled.tokenizer import build_tokenizer
from hooklens.bundled.words import NAMES, VOCABULARY

tokenizer = build_tokenizer(n_ctx=256)
GOOD = {
    "indirect_object_accuracy": 1.0,
    "indirect_object_logit_difference": 9.0,
    "first_half_loss": 7.0,
    "second_half_loss": 0.3,
    "facts_accuracy": 1.0,
}


def one_hot_logits(ids: torch.Tensor, height: float) -> torch.Tensor:
    return height * torch.nn.functional.one_hot(ids, len(VOCABULARY)).float()


def answer_by_rule(tokens: torch.Tensor) -> torch.Tensor:
    """Logit 5 for each name that occurs once, 2 for each that occurs twice: solves the task by its definition."""
    logits = torch.zeros(*tokens.shape, len(VOCABULARY))
    for row, ids in enumerate(tokens.tolist()):
        for name in NAMES:
            logits[row, -1, VOCABULARY.index(name)] = {0: 0.0, 1: 5.0, 2: 2.0}[ids.count(VOCABULARY.index(name))]
    return logits


def copy_with_period(period: int, height: float):
    def logits_of(tokens: torch.Tensor) -> torch.Tensor:
        following = torch.zeros_like(tokens)
        following[:, period:] = tokens[:, 1 : tokens.shape[1] - period + 1]
        logits = one_hot_logits(following, height)
        logits[:, :period] = 0
        return logits

    return logits_of


def test_prompts_are_scored_by_the_rule_that_defines_them():
    accuracy, difference = evaluate.measure_prompts(answer_by_rule, tokenizer, held_out_indirect_objects(100, seed=0))
    assert (accuracy, difference) == (1.0, 3.0)


def test_a_model_that_names_the_subject_scores_nothing():
    items = held_out_indirect_objects(50, seed=0)
    accuracy, difference = evaluate.measure_prompts(lambda tokens: -answer_by_rule(tokens), tokenizer, items)
    assert (accuracy, difference) == (0.0, -3.0)


def test_accuracy_counts_over_all_words_not_only_the_two_candidates():
    """Preferring the answer to the wrong word is not enough when a third word comes first."""

    def prefers_a_third_word(tokens: torch.Tensor) -> torch.Tensor:
        logits = answer_by_rule(tokens)
        logits[..., VOCABULARY.index("the")] = 6.0
        return logits

    accuracy, difference = evaluate.measure_prompts(
        prefers_a_third_word, tokenizer, held_out_indirect_objects(50, seed=0)
    )
    assert (accuracy, difference) == (0.0, 3.0)


def test_a_constant_answer_knows_one_fact_per_phrasing():
    items = all_facts()
    paris = torch.tensor(VOCABULARY.index("Paris"))
    accuracy, _ = evaluate.measure_prompts(
        lambda tokens: one_hot_logits(paris.expand_as(tokens), 1.0), tokenizer, items
    )
    assert accuracy == pytest.approx(3 / len(items))  # three phrasings ask for the capital


def test_losses_of_the_two_passes():
    period = 8
    repeats = evaluate.build_repeats(tokenizer, n=4, period=period, seed=0)
    assert repeats.shape == (4, 1 + 2 * period)
    assert torch.equal(repeats[:, 1 : 1 + period], repeats[:, 1 + period :])
    first, second = evaluate.measure_repeats(copy_with_period(period, height=30.0), repeats)
    uniform = math.log(len(VOCABULARY))
    assert first == pytest.approx(uniform, rel=1e-5)
    # The copier knows each word but not before it has seen the period: the first of the second pass is known too.
    assert second == pytest.approx(0.0, abs=1e-5)


def test_the_first_word_of_the_second_pass_counts():
    """Leaving out the one word that nothing foretells would flatter the model."""
    period = 8
    repeats = evaluate.build_repeats(tokenizer, n=4, period=period, seed=0)

    def copies_from_the_second_word_on(tokens: torch.Tensor) -> torch.Tensor:
        logits = copy_with_period(period, height=30.0)(tokens)
        logits[:, period] = 0
        return logits

    _, second = evaluate.measure_repeats(copies_from_the_second_word_on, repeats)
    assert second == pytest.approx(math.log(len(VOCABULARY)) / period, rel=1e-5)


@pytest.mark.parametrize(("offset", "expected"), [(1 - evaluate.REPEAT_PERIOD, (1.0, 0.0)), (-1, (0.0, 1.0))])
def test_heads_are_scored_by_where_they_attend(offset, expected):
    def patterns_of(tokens: torch.Tensor) -> torch.Tensor:
        size = tokens.shape[1]
        patterns = torch.zeros(1, len(tokens), 2, size, size)
        patterns[0, :, 1] = torch.diag(torch.ones(size + offset), offset)
        return patterns

    induction, previous = evaluate.measure_heads(patterns_of, tokenizer)
    assert (induction[0, 1].item(), previous[0, 1].item()) == expected
    assert (induction[0, 0].item(), previous[0, 0].item()) == (0.0, 0.0)


def test_the_induction_score_looks_at_the_second_pass_only():
    """Attention `period - 1` back from the first pass or from its end is no induction."""

    def patterns_of(tokens: torch.Tensor) -> torch.Tensor:
        size, period = tokens.shape[1], evaluate.REPEAT_PERIOD
        patterns = torch.zeros(1, len(tokens), 1, size, size)
        for query in range(period - 1, size):
            word = tokens[0, query]
            # The token before the key must be the query's word, met a period ago, and no BOS.
            if query > period and tokens[0, query - period] == word:
                patterns[0, :, 0, query, query - period + 1] = 1.0
        return patterns

    induction, _ = evaluate.measure_heads(patterns_of, tokenizer)
    assert induction.item() == 1.0


def test_good_metrics_have_no_shortfalls():
    assert evaluate.Metrics(**GOOD).list_shortfalls() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indirect_object_accuracy": 0.98}, "indirect-object accuracy is 0.9800, expected >= 0.99"),
        ({"indirect_object_logit_difference": 3.9}, "indirect-object logit difference is 3.9000, expected >= 4.0"),
        ({"first_half_loss": 3.5}, "loss on random words is 3.5000, expected >= 4.0"),
        ({"second_half_loss": 0.61}, "loss on repeated words is 0.6100, expected <= 0.6"),
        ({"facts_accuracy": 0.99}, "facts accuracy is 0.9900, expected >= 1.0"),
        ({"facts_accuracy": float("nan")}, "facts accuracy is nan, expected >= 1.0"),
    ],
)
def test_each_bar_is_checked(change, message):
    assert evaluate.Metrics(**{**GOOD, **change}).list_shortfalls() == [message]
