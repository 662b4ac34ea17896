"""Tests of hooklens.evaluation.batching: rows of similar length together, as many as memory holds."""

from itertools import accumulate, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.config import AlibiPositions, RotaryPositions
from hooklens.evaluation.batching import (
    choose_batch_size,
    estimate_bytes_for_prefix,
    estimate_bytes_per_token,
    plan_batches,
)
from hooklens.evaluation.prefix import make_prefix
from hooklens.evaluation.scoring import score_rows
from tests.model.networks import CONFIGS, make_config, make_model
from tests.slow_cases import slow_but

BARE = make_model("bare")


@given(lengths=st.lists(st.integers(1, 9), max_size=30), batch_size=st.integers(1, 7))
def test_every_row_is_planned_once_longest_first(lengths, batch_size):
    batches = list(plan_batches(BARE, lengths, n_prefix=3, batch_size=batch_size))
    planned = [index for batch in batches for index in batch]
    assert sorted(planned) == list(range(len(lengths)))
    assert [lengths[index] for index in planned] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_batches_shrink_with_the_rows_and_with_memory(monkeypatch):
    model = make_model("capped")
    monkeypatch.setattr("hooklens.evaluation.batching.assume_free_bytes", lambda device: 2**22)
    small, large = choose_batch_size(model, 10, 1), choose_batch_size(model, 10, 8)
    assert small > large > 1
    assert choose_batch_size(model, 100_000, 8) == 1
    per_row = 8 * estimate_bytes_per_token(model, 10, 8)
    budget = 2**20 - estimate_bytes_for_prefix(model, 10)
    assert large * per_row <= budget < (large + 1) * per_row


def measure_peak(run) -> int:
    """The most bytes that the CPU's allocator has given out at once while a function runs, inside operators, too."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return max(held)


def test_peaks_are_measured_inside_operators():
    """`logsumexp` holds the exponentials of all entries."""
    assert measure_peak(lambda: torch.zeros(1000, 1000)) == 4_000_000
    assert 8_000_000 <= measure_peak(lambda: torch.zeros(1000, 1000).logsumexp(-1)) < 8_100_000


WIDE = {
    "wide mlp": {"d_mlp": 600, "act_fn": "gelu_quick"},
    "wide gated mlp": {"d_mlp": 600, "gated_mlp": True, "act_fn": "silu"},
    "large vocabulary": {"d_vocab": 3000},
    "wide stream": {"d_model": 400, "n_layers": 5},
    "many heads": {"n_heads": 32, "n_kv_heads": 32, "positions": RotaryPositions(dim=6)},
    "many heads on few keys": {"n_heads": 32, "n_kv_heads": 2, "positions": RotaryPositions(dim=6)},
    "many heads, alibi": {"n_heads": 32, "n_kv_heads": 32, "positions": AlibiPositions()},
    "windows": {"n_layers": 4, "windows": (3, 7, None, 3)},
}
NETWORKS = {**CONFIGS, **{name: make_config(**changes) for name, changes in WIDE.items()}}


# What half precision changes is how scores, caps, rotations and sums over the vocabulary are held.
HALF = ("rotary", "capped", "alibi, grouped", "windows", "large vocabulary", "wide mlp", "many heads on few keys")


@pytest.mark.parametrize(
    ("network", "dtype"),
    slow_but(
        product(NETWORKS, [torch.float32, torch.bfloat16]),
        [*((name, torch.float32) for name in NETWORKS), *((name, torch.bfloat16) for name in HALF)],
    ),
    ids=str,
)
def test_no_batch_takes_more_than_the_estimate(network, dtype):
    """Masks of rows of different length were left out: 45 MB were estimated of 137 for four rows of 1,900 tokens.

    Ragged rows and equal ones, short and long, behind long prefixes and short ones.
    """
    model = make_model(NETWORKS[network].replace(n_ctx=700), dtype=dtype)
    for n_prefix, lengths in ((10, [300, 270, 100, 2]), (10, [120] * 4), (600, [20, 19, 3]), (600, [20] * 4), (4, [2])):
        prefix = make_prefix(model, [1 + i % 20 for i in range(n_prefix)])
        rows = [[3] * length for length in lengths]
        peak = measure_peak(lambda prefix=prefix, rows=rows: list(score_rows(model, prefix, rows, batch_size=4)))
        bound = len(rows) * max(lengths) * estimate_bytes_per_token(model, n_prefix, max(lengths))
        # What does not grow with the rows: the mask of a row of padding, small tables, a page for the allocator.
        assert peak <= bound + estimate_bytes_for_prefix(model, n_prefix) + 2**16, (n_prefix, lengths)


def test_the_estimate_of_long_ragged_rows_is_near_what_they_take():
    """A bound that is many times too large would run rows one by one."""
    model = make_model(CONFIGS["rotary"].replace(n_ctx=2000), dtype=torch.float32)
    prefix, lengths = make_prefix(model, [1, 2, 3]), [1900, 1700, 1500, 1300]
    peak = measure_peak(lambda: list(score_rows(model, prefix, [[3] * n for n in lengths], batch_size=4)))
    assert peak <= 4 * 1900 * estimate_bytes_per_token(model, 3, 1900) <= 2 * peak
