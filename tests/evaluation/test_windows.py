"""Tests of hooklens.evaluation.windows: pairs of contexts and continuations, in any order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.config import RotaryPositions, RotaryScaling
from hooklens.errors import EditError, InputError
from hooklens.evaluation.windows import Window, cut_window, group_windows, score_windows
from hooklens.hooks.edits import Custom, Scale, Zero
from tests.evaluation.networks import N_CTX, draw_row, reader, score_alone
from tests.model.networks import CONFIGS, make_config, make_model

ROW = st.lists(st.integers(1, 4), min_size=1, max_size=7)


def collect(model, windows, **options):
    scores = {}
    for batch in score_windows(model, windows, **options):
        assert not scores.keys() & batch.keys()
        scores.update(batch)
    return [scores[index] for index in range(len(windows))]


def count_tokens(model, windows, **options):
    """The tokens that run, those that fill rows up included."""
    run = []
    with model.hooks(fwd_hooks=[("hook_embed", lambda tensor: run.append(tensor.shape[0] * tensor.shape[1]))]):
        collect(model, windows, **options)
    return sum(run)


@torch.no_grad()
def score_without_last(model, window):
    """The log-probabilities of a window's continuation, from one run of all tokens but the last."""
    tokens = torch.tensor([[*window.context, *window.continuation[:-1]]])
    logprobs = model(tokens, attention_mask=torch.ones_like(tokens)).log_softmax(-1)[0, len(window.context) - 1 :]
    return [float(logprobs[place, token]) for place, token in enumerate(window.continuation)]


@settings(max_examples=25)
@given(
    network=st.sampled_from(list(CONFIGS)),
    pairs=st.lists(st.tuples(ROW, ROW), min_size=1, max_size=8),
    batch_size=st.integers(1, 3) | st.just("auto"),
)
def test_scores_are_those_of_each_pair_alone(network, pairs, batch_size):
    """Few tokens, so that contexts often begin alike, are equal, or begin another one."""
    model = make_model(network)
    windows = [Window(tuple(context), tuple(row)) for context, row in pairs]
    for window, score in zip(windows, collect(model, windows, batch_size=batch_size), strict=True):
        assert score.logprobs == pytest.approx(score_alone(model, window.context, window.continuation), abs=1e-10)


@given(contexts=st.lists(ROW.map(tuple), max_size=12))
def test_groups_hold_each_context_once_behind_a_prefix_of_it(contexts):
    members = []
    for group in group_windows(contexts):
        assert group.prefix
        assert all(contexts[index][: len(group.prefix)] == group.prefix for index in group.members)
        members += group.members
    assert sorted(members) == list(range(len(contexts)))


def test_contexts_are_divided_where_they_share_too_little():
    one, other = tuple(range(1, 21)), tuple(range(21, 41))
    contexts = [(0, *other, 5), (0, *one, 3), (0, *one, 2), (0, *other, 6), (0, 50), (0, 51), (60,), (0, *one, 2)]
    groups = {(group.prefix, tuple(sorted(group.members))) for group in group_windows(contexts)}
    assert groups == {
        ((0, *one, 2), (2, 7)),
        ((0, *one, 3), (1,)),
        ((0, *other), (0, 3)),
        ((0,), (4, 5)),
        ((60,), (6,)),
    }


def test_what_contexts_share_runs_once():
    model = reader()
    beginning = draw_row(20, seed=0)
    once = [Window((*beginning, 1 + n), (3, 4)) for n in range(4)]
    # The beginning, then of each its own token and the first of its two, whose last is predicted.
    assert count_tokens(model, once) == 20 + 4 * 2
    twice = [Window((*beginning, 1 + n), (3, token)) for n in range(4) for token in (4, 5)]
    assert count_tokens(model, twice) == 20 + 4 * (1 + 2)


def test_only_what_predicts_scored_tokens_is_unembedded():
    model = reader()
    windows = [Window((1, *draw_row(9, seed=n)), (3, 4)) for n in range(4)]
    widths = []
    with model.hooks(fwd_hooks=[("unembed.hook_out", lambda tensor: widths.append(tensor.shape[1]))]):
        collect(model, windows)
    assert widths == [1, 2]


def test_a_window_fills_the_context_with_what_runs():
    """The last token is predicted and never runs, so a window is one token longer than the context."""
    model = reader()
    context, row = draw_row(60, seed=0), draw_row(5, seed=1)
    window = cut_window(context, row, N_CTX)
    assert window.n_run == N_CTX
    assert window.context == tuple(context[-(N_CTX - 4) :])
    expected = score_without_last(model, window)
    identity = Custom("blocks.1.hook_resid_post", lambda tensor: tensor)
    for edits in ([], [identity]):
        assert collect(model, [window], edits=edits)[0].logprobs == pytest.approx(expected, abs=1e-10)


def test_lengths_that_change_the_frequencies_run_whole():
    scaling = RotaryScaling(kind="dynamic", factor=4.0, original_n_ctx=8)
    model = make_model(make_config(positions=RotaryPositions(dim=6, scaling=scaling)))
    windows = [Window(tuple(draw_row(5, seed=0)), tuple(draw_row(n, seed=n))) for n in (2, 3, 4, 6)]
    for window, score in zip(windows, collect(model, windows), strict=True):
        assert score.logprobs == pytest.approx(score_without_last(model, window), abs=1e-10)


@pytest.mark.parametrize(
    "edit",
    [
        Zero("blocks.0.hook_mlp_out"),
        Scale("blocks.0.hook_attn_out", 0.5, pos=1),
        Scale("blocks.0.hook_attn_out", 0.5, pos=[0, 2]),
        Scale("blocks.0.hook_attn_out", 0.5, pos=slice(1, None)),
        Custom("blocks.0.attn.hook_pattern", lambda tensor: tensor * 0.9),
    ],
)
def test_edits_act_as_on_each_pair_alone(edit):
    model = reader()
    beginning = draw_row(6, seed=0)
    windows = [Window((*beginning, n), tuple(draw_row(2 + n % 2, seed=n))) for n in (1, 2, 3, 1)]
    plain = collect(model, windows)
    for window, score, unedited in zip(windows, collect(model, windows, edits=[edit]), plain, strict=True):
        expected = score_alone(model, window.context, window.continuation, [edit])
        assert score.logprobs == pytest.approx(expected, abs=1e-10)
        assert score.logprobs != pytest.approx(unedited.logprobs, abs=1e-6)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Zero("blocks.0.hook_mlp_out", pos=-1), r"pos=-1 counts from the end"),
        (Zero("blocks.0.hook_mlp_out", pos=slice(-2, None)), "counts from the end"),
        (Zero("blocks.0.hook_mlp_out", pos=4), r"pos=4 is no token of requests 1 of 2, .*\(the shortest: 3\)"),
        (Zero("blocks.0.hook_mlp_out", pos=[0, 9]), r"is no token of requests 0, 1 of 2"),
        (Zero("blocks.0.hook_mlp_out", rows=0), "name rows"),
    ],
)
def test_positions_that_differ_between_windows_are_refused(edit, message):
    model = reader()
    windows = [Window((1, 2, 3, 4), (5, 6)), Window((1, 2, 3), (4,))]
    with pytest.raises((InputError, EditError), match=message):
        list(score_windows(model, windows, edits=[edit]))


@pytest.mark.parametrize(
    ("context", "row", "message"),
    [
        ([], [1], "a context of 0 and a continuation of 1 tokens"),
        ([1], [], "a context of 1 and a continuation of 0 tokens"),
        ([1], [1] * 9, "a continuation of 9 tokens is longer than the 8 that run at once"),
    ],
)
def test_pairs_that_are_no_windows_are_refused(context, row, message):
    with pytest.raises(InputError, match=message):
        cut_window(context, row, 8)


def test_nothing_has_no_scores():
    assert list(score_windows(reader(), [])) == []
