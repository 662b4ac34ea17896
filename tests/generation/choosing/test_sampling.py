"""Draws follow the distribution, and belong to their row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from hooklens.generation.choosing.sampling import RowDraws, sample_tokens, token_log_probs
from tests.generation.networks import pair

CPU = torch.device("cpu")


@pytest.mark.parametrize("keywords", [{}, {"temperature": 0.6, "top_p": 0.8}], ids=["plain", "warped"])
def test_draws_pass_a_chi_square_test_against_the_processed_softmax(keywords):
    model, _ = pair()
    ids = torch.tensor([[5, 17, 80]])
    n = 4000
    drawn = model.generate(ids, num_return_sequences=n, max_new_tokens=1, seed=11, verbose=False, **keywords)[:, -1]
    with torch.no_grad():
        scores = model(ids)[:, -1]
    if keywords:
        scores = LogitsProcessorList([TemperatureLogitsWarper(0.6), TopPLogitsWarper(0.8)])(ids, scores)
    expected = n * scores[0].softmax(-1).double()
    counts = torch.bincount(drawn, minlength=97).double()
    assert (counts[expected == 0] == 0).all()
    # The test's approximation wants five expected draws in a cell: the rest is one cell.
    common = expected >= 5
    cells = [(counts[common], expected[common])]
    if expected[~common].sum() > 0:
        cells.append((counts[~common].sum()[None], expected[~common].sum()[None]))
    observed, wanted = (torch.cat(column) for column in zip(*cells, strict=True))
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = torch.tensor(len(wanted) - 1, dtype=torch.float64)
    p_value = torch.special.gammaincc(degrees / 2, statistic / 2)
    # The seed is fixed, so the test passes or fails for good; a sound sampler fails one seed in a thousand.
    assert len(wanted) > 5
    assert p_value > 1e-3


@given(
    scores=st.lists(st.one_of(st.floats(-20, 20), st.just(-torch.inf)), min_size=1, max_size=8).filter(
        lambda row: max(row) > -torch.inf
    ),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_tokens_that_are_ruled_out_are_never_drawn(scores, uniform):
    row = torch.tensor([scores])
    for number in (uniform, 0.0, 1 - 2**-53):
        token = int(sample_tokens(row, torch.tensor([number], dtype=torch.float64)))
        assert 0 <= token < len(scores)
        assert scores[token] > -torch.inf


def test_draws_invert_the_cumulative_distribution():
    scores = torch.tensor([0.5, 0.25, 0.25]).log().expand(4, 3)
    uniform = torch.tensor([0.0, 0.49, 0.51, 0.76], dtype=torch.float64)
    assert sample_tokens(scores, uniform).tolist() == [0, 0, 1, 2]


def test_a_rows_numbers_do_not_depend_on_other_rows():
    few, many = RowDraws(2, 5, CPU), RowDraws(7, 5, CPU)
    for _ in range(150):
        assert torch.equal(few.draw(), many.draw()[:2])
    numbers = torch.stack([many.draw() for _ in range(100)])
    assert len(numbers.unique()) == numbers.numel()


def test_seeds_beside_each_other_share_no_row():
    first, second = RowDraws(8, 5, CPU).draw(), RowDraws(8, 6, CPU).draw()
    assert not set(first.tolist()) & set(second.tolist())


def test_log_probabilities_are_those_of_the_log_softmax():
    logits = torch.randn(3, 11, dtype=torch.float64)
    tokens = torch.tensor([4, 0, 10])
    expected = logits.log_softmax(-1)[torch.arange(3), tokens]
    torch.testing.assert_close(token_log_probs(logits, tokens), expected)
