"""Tests of hooklens.evaluation.scoring: rows behind a prefix, in batches that memory allows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.evaluation.prefix import make_prefix
from hooklens.evaluation.scoring import RowScore, score_rows
from tests.evaluation.networks import draw_row, reader, score_alone
from tests.model.networks import CONFIGS, make_config, make_model


def collect(model, prefix, rows, **options) -> list[RowScore]:
    scores: dict[int, RowScore] = {}
    for batch in score_rows(model, prefix, rows, **options):
        assert not scores.keys() & batch.keys()
        scores.update(batch)
    return [scores[i] for i in range(len(rows))]


@settings(max_examples=25)
@given(
    network=st.sampled_from(list(CONFIGS)),
    n_prefix=st.integers(1, 8),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    batch_size=st.integers(1, 3) | st.just("auto"),
)
def test_scores_are_those_of_full_sequences(network, n_prefix, lengths, batch_size):
    model = make_model(network)
    prefix, rows = draw_row(n_prefix, seed=50), [draw_row(n, seed=i) for i, n in enumerate(lengths)]
    scores = collect(model, make_prefix(model, prefix), rows, batch_size=batch_size)
    for row, score in zip(rows, scores, strict=True):
        assert score.logprobs == pytest.approx(score_alone(model, prefix, row), abs=1e-10)
        assert score.total == pytest.approx(sum(score.logprobs))


def test_lengths_that_change_the_frequencies_run_whole():
    """Under dynamic rotary scaling no cached key fits a sequence past the original length."""
    scaling = RotaryScaling(kind="dynamic", factor=4.0, original_n_ctx=8)
    model = make_model(make_config(positions=RotaryPositions(dim=6, scaling=scaling)))
    prefix, rows = draw_row(5, seed=0), [draw_row(n, seed=n) for n in (2, 6, 4, 9)]
    scores = collect(model, make_prefix(model, prefix), rows)
    for row, score in zip(rows, scores, strict=True):
        assert score.logprobs == pytest.approx(score_alone(model, prefix, row), abs=1e-10)


def test_prefix_runs_once():
    model = reader()
    seen: list[int] = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda tensor, hook: seen.append(tensor.shape[1]))]):
        prefix = make_prefix(model, draw_row(9, seed=0))
        collect(model, prefix, [draw_row(n, seed=n) for n in (3, 1, 3, 2)], batch_size=2)
    assert seen == [9, 2, 1]


def test_batch_that_is_too_large_runs_in_halves():
    model = reader()
    prefix, rows = draw_row(4, seed=0), [draw_row(3, seed=n) for n in range(5)]
    ready = make_prefix(model, prefix)
    sizes: list[int] = []

    def fail(tensor, hook):
        sizes.append(len(tensor))
        if len(tensor) > 2:
            raise torch.OutOfMemoryError("no memory")

    with model.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", fail)]):
        scores = collect(model, ready, rows)
        assert sizes == [5, 2, 3, 1, 2]
        with pytest.raises(torch.OutOfMemoryError):
            collect(model, ready, rows, batch_size=5)
    for row, score in zip(rows, scores, strict=True):
        assert score.logprobs == pytest.approx(score_alone(model, prefix, row), abs=1e-10)


def test_half_precision_is_scored_in_float32():
    model = make_model("grouped", dtype=torch.bfloat16)
    prefix, row = draw_row(4, seed=0), draw_row(3, seed=1)
    ready = make_prefix(model, prefix)
    [score] = collect(model, ready, [row])
    first = ready.cache.last_logits[0].float().log_softmax(-1)
    # A log-probability of -3 has steps of 2 ** -6 in bfloat16.
    assert score.logprobs[0] == pytest.approx(float(first[row[0]]), abs=1e-5)
