"""Tests of hooklens.model.attend: the fused kernel and the explicit way against loops over heads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hooklens.model.attend import attend, compute_pattern, weigh_values


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 2), n_query=st.integers(1, 4), n_past=st.integers(0, 3), n_kv_heads=st.integers(1, 2),
    group=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
def test_fused_and_explicit_against_a_loop(batch, n_query, n_past, n_kv_heads, group, seed):
    generator = torch.Generator().manual_seed(seed)
    n_key, n_heads = n_past + n_query, n_kv_heads * group

    def draw(n, heads):
        return torch.randn(batch, n, heads, 5, generator=generator, dtype=torch.float64)

    q, k, v = draw(n_query, n_heads), draw(n_key, n_kv_heads), draw(n_key, n_kv_heads)
    hidden = torch.arange(n_key)[None] > torch.arange(n_past, n_key)[:, None]
    expected = torch.empty_like(q)
    pattern = torch.empty(batch, n_heads, n_query, n_key, dtype=torch.float64)
    for row in range(batch):
        for head in range(n_heads):
            keys, values = k[row, :, head // group], v[row, :, head // group]
            scores = (q[row, :, head] @ keys.T * 0.7).masked_fill(hidden, -torch.inf)
            pattern[row, head] = scores.softmax(-1)
            expected[row, :, head] = pattern[row, head] @ values
    mask = torch.zeros(1, 1, n_query, n_key, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    fused = attend(q, k, v, score_scale=0.7, mask=mask, is_causal=False)
    torch.testing.assert_close(fused, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weigh_values(pattern, v), expected, rtol=1e-12, atol=1e-12)
    if n_past == 0:
        causal = attend(q, k, v, score_scale=0.7, mask=None, is_causal=True)
        torch.testing.assert_close(causal, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_softmax_of_half_precision_is_taken_in_float32(dtype):
    scores = (torch.randn(1, 2, 3, 300) * 4).to(dtype)
    wide = scores if dtype == torch.float64 else scores.float()
    pattern = compute_pattern(scores, can_hide_all=False)
    assert pattern.dtype == dtype
    assert torch.equal(pattern, wide.softmax(-1).to(dtype))


def test_a_fully_masked_row_is_zero():
    scores = torch.randn(1, 1, 2, 3)
    scores[..., 0, :] = -torch.inf
    pattern = compute_pattern(scores, can_hide_all=True)
    assert pattern[..., 0, :].tolist() == [[[0, 0, 0]]]
    torch.testing.assert_close(pattern.sum(-1)[..., 1], torch.ones(1, 1))
