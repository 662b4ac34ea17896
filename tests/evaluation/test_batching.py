"""Tests of hooklens.evaluation.batching: rows of similar length together, as many as memory holds."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.evaluation.batching import choose_batch_size, estimate_bytes_per_token, plan_batches
from tests.model.networks import Allocations, make_model, random_tokens


@given(lengths=st.lists(st.integers(1, 9), max_size=30), batch_size=st.integers(1, 7))
def test_every_row_is_planned_once_longest_first(lengths, batch_size):
    model = make_model("bare")
    batches = list(plan_batches(model, lengths, n_prefix=3, batch_size=batch_size))
    planned = [index for batch in batches for index in batch]
    assert sorted(planned) == list(range(len(lengths)))
    assert [lengths[index] for index in planned] == sorted(lengths, reverse=True)
    assert all(len(batch) == batch_size for batch in batches[:-1])


def test_batches_shrink_with_the_rows_and_with_memory(monkeypatch):
    model = make_model("capped")
    monkeypatch.setattr("hooklens.evaluation.batching._free_memory", lambda device: 2**22)
    small, large = choose_batch_size(model, 10, 1), choose_batch_size(model, 10, 8)
    assert small > large > 1
    assert choose_batch_size(model, 100_000, 8) == 1
    per_token = estimate_bytes_per_token(model, 10)
    assert large * 8 * per_token <= 2**20 < (large + 1) * 8 * per_token


@torch.no_grad()
def test_no_operation_allocates_more_than_the_estimate():
    """The largest tensor of a call stays below what is estimated for all of them together."""
    for network in ("rotary", "capped", "alibi, grouped"):
        model = make_model(network)
        kv = model.prefill(random_tokens(1, 20))
        with Allocations() as allocated:
            model(random_tokens(16, 4, seed=3), past_kv_cache=kv)
        largest = max(torch.Size(shape).numel() for _, shape in allocated.sizes) * 8
        assert largest < 16 * 4 * estimate_bytes_per_token(model, 20)
