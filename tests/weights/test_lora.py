"""Low-rank changes, held against their published definitions."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.weights.lora import dora_factor, lora_delta, lora_scale


@given(alpha=st.floats(0.5, 64), rank=st.integers(1, 64))
def test_scales(alpha: float, rank: int) -> None:
    assert lora_scale(alpha, rank) == alpha / rank
    assert lora_scale(alpha, rank, rslora=True) == pytest.approx(alpha / math.sqrt(rank), rel=1e-15)


def test_the_change_is_the_one_of_the_two_maps_in_a_row() -> None:
    A, B = torch.randn(3, 7, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    x = torch.randn(7, dtype=torch.float64)
    torch.testing.assert_close(lora_delta(A, B, 1.5) @ x, 1.5 * (B @ (A @ x)), rtol=1e-13, atol=1e-13)


def test_a_change_for_each_expert() -> None:
    A, B = torch.randn(4, 3, 7), torch.randn(4, 5, 3)
    found = lora_delta(A, B, 2.0)
    assert all(torch.allclose(found[one], lora_delta(A[one], B[one], 2.0)) for one in range(4))


def test_rows_have_the_lengths_and_keep_their_directions() -> None:
    changed, magnitude = torch.randn(5, 7, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    found = dora_factor(changed, magnitude) * changed
    torch.testing.assert_close(found.norm(dim=1), magnitude, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cosine_similarity(found, changed), torch.ones(5, dtype=torch.float64))
