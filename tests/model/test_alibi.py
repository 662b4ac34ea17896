"""Tests of hooklens.model.alibi: slopes, the term, and the attention without a mask."""

import pytest
import torch
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from hooklens.config import AlibiPositions
from hooklens.model.alibi import alibi_slopes, alibi_term, fold_into_heads
from hooklens.model.attend import attend


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 71])
def test_slopes_and_rounding_against_transformers(n_heads):
    mask = torch.ones(1, 300, dtype=torch.long)
    theirs = build_alibi_tensor(mask, n_heads, torch.bfloat16).view(n_heads, 300)
    ours = alibi_term(
        AlibiPositions(bfloat16=True), alibi_slopes(n_heads), torch.arange(300)[None], 0.5, torch.bfloat16
    )
    assert torch.equal(ours[0].T.bfloat16(), theirs)


def test_slopes_of_a_power_of_two_are_geometric():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_the_term_is_scaled_only_where_the_config_says_so():
    slopes, keys = alibi_slopes(4), torch.tensor([[0, 1, 7]])
    plain = alibi_term(AlibiPositions(), slopes, keys, 0.25, torch.float64)
    assert plain.dtype == torch.float64
    assert torch.equal(plain[0], keys[0][:, None] * slopes.double())
    assert torch.equal(alibi_term(AlibiPositions(scaled=True), slopes, keys, 0.25, torch.float64), plain * 0.25)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        # Half precision rounds q, k, v and the result: a few units in the last place of values around 1.
        (torch.bfloat16, 4 * 2**-8),
        (torch.float16, 4 * 2**-11),
    ],
)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_folding_gives_the_biased_softmax(dtype, tolerance, n_kv_heads):
    """Key positions in the hundreds: a term rounded to half precision would be off by whole units."""
    generator = torch.Generator().manual_seed(0)
    n_keys, scale = 300, 0.35
    q, k, v = (
        torch.randn(2, n, heads, 8, generator=generator, dtype=torch.float64).to(dtype)
        for n, heads in ((n_keys, 4), (n_keys, n_kv_heads), (n_keys, n_kv_heads))
    )
    term = alibi_term(AlibiPositions(), alibi_slopes(4), torch.arange(n_keys)[None], scale, dtype)
    wide_k, wide_v = (x.double().repeat_interleave(4 // n_kv_heads, 2) for x in (k, v))
    scores = torch.einsum("bqnh,bknh->bnqk", q.double(), wide_k) * scale + term.double().permute(0, 2, 1)[:, :, None]
    scores = scores.masked_fill(torch.ones(n_keys, n_keys).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), wide_v)
    folded = fold_into_heads(q, k, v, term, scale)
    found = attend(*folded, score_scale=scale, mask=None, is_causal=True)[..., :8]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
