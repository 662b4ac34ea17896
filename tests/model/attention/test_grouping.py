"""Tests of hooklens.model.attention.grouping: the way of grouped queries; splitting and joining are inverse."""

import pytest
import torch

from hooklens.model.attention.grouping import HeadCalls, by_group, from_groups

WAYS = {
    # Heads, key-value heads, whether the mask differs between queries, how many numbers are few, the calls made.
    "same": (4, 4, True, 0, 1),
    "folded": (4, 2, False, 0, 1),
    "repeated": (4, 2, True, 2**20, 1),
    "by_kv_head": (12, 2, True, 0, 2),
    "by_member": (12, 6, True, 0, 2),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_the_attention_of_repeated_keys(way, monkeypatch):
    n_heads, n_kv_heads, differs, few, n_calls = WAYS[way]
    monkeypatch.setattr("hooklens.model.attention.grouping._FEW_NUMBERS", few)
    q, k, v = (torch.randn(2, n, heads, 3, dtype=torch.float64) for n, heads in ((50, n_heads), *[(7, n_kv_heads)] * 2))
    mask = torch.zeros(2, 1, 50 if differs else 1, 7, dtype=torch.float64).masked_fill(torch.rand(7) < 0.3, -torch.inf)
    calls = HeadCalls(q, k, mask, is_causal=False)
    assert calls.way == way
    results, sums = [], []
    for q_i, (k_i, v_i) in zip(calls.split(q), calls.split_keys(k, v), strict=True):
        assert q_i.shape[1] == k_i.shape[1] == v_i.shape[1]
        scores = q_i @ k_i.mT + calls.mask
        results.append(scores.softmax(-1) @ v_i)
        sums.append(scores.logsumexp(-1))
    assert len(results) == n_calls
    wide_k, wide_v = (x.repeat_interleave(n_heads // n_kv_heads, 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ wide_k.mT + mask
    torch.testing.assert_close(calls.join(results), (scores.softmax(-1) @ wide_v).transpose(1, 2))
    torch.testing.assert_close(calls.join_sums(sums), scores.logsumexp(-1))
    assert torch.equal(calls.join(calls.split(q)), q)
    assert torch.equal(calls.join_sums(calls.split_sums(scores[..., 0])), scores[..., 0])
    # The gradient of a key is the sum over what became of it.
    ones = [torch.ones_like(k_i) for k_i, _ in calls.split_keys(k, v)]
    copies = {"repeated": n_heads // n_kv_heads, "by_kv_head": n_heads // n_kv_heads, "by_member": n_calls}
    assert torch.equal(calls.join_keys(ones), torch.full_like(k, copies.get(way, 1)))


def test_a_mask_smaller_than_the_keys_is_repeated():
    q, k = torch.randn(2, 3, 4, 8), torch.randn(2, 50, 2, 8)
    mask = torch.zeros(1, 1, 3, 50)
    calls = HeadCalls(q, k, mask, is_causal=False)
    assert calls.way == "folded"
    assert calls.mask.shape == (1, 1, 6, 50)


def test_groups_are_inverse():
    x = torch.randn(2, 5, 6, 3)
    grouped = by_group(x, 2)
    assert grouped.shape == (2, 2, 15, 3)
    assert torch.equal(grouped[:, 1, 5:10], x[:, :, 4])
    assert torch.equal(from_groups(grouped, 6), x)
