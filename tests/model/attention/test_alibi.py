"""Tests of hooklens.model.attention.alibi: slopes, the term, and the attention without a mask."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.falcon.modeling_falcon import build_alibi_tensor

from hooklens.config import AlibiPositions
from hooklens.model.attention.alibi import alibi_slopes, alibi_term, fold_into_heads, make_alibi_entries
from hooklens.model.attention.attend import attend, attend_with_log_sum


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 71])
def test_slopes_and_rounding_against_transformers(n_heads):
    mask = torch.ones(1, 300, dtype=torch.long)
    theirs = build_alibi_tensor(mask, n_heads, torch.bfloat16).view(n_heads, 300)
    ours = alibi_term(
        AlibiPositions(bfloat16=True), alibi_slopes(n_heads), torch.arange(300)[None], 0.5, torch.bfloat16
    )
    assert torch.equal(ours[0].T.bfloat16(), theirs)


def test_slopes_are_the_published_ones():
    """Computed on the device, they are what the reference computes number by number."""
    for n_heads in range(1, 130):
        n_even = 2 ** (n_heads.bit_length() - 1)
        slopes = [2 ** (-8 * i / n_even) for i in range(1, n_even + 1)]
        slopes += [2 ** (-4 * j / n_even) for j in range(1, 2 * (n_heads - n_even), 2)]
        assert torch.equal(alibi_slopes(n_heads), torch.tensor(slopes))


def test_slopes_of_a_power_of_two_are_geometric():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6).tolist() == pytest.approx([2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])


def test_the_term_is_scaled_only_where_the_config_says_so():
    slopes, keys = alibi_slopes(4), torch.tensor([[0, 1, 7]])
    plain = alibi_term(AlibiPositions(), slopes, keys, 0.25, torch.float64)
    assert plain.dtype == torch.float64
    assert torch.equal(plain[0], keys[0][:, None] * slopes.double())
    assert torch.equal(alibi_term(AlibiPositions(scaled=True), slopes, keys, 0.25, torch.float64), plain * 0.25)


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_entries(alibi, n_heads, positions, dtype, *, scale=0.35, n_kv_heads=None, n_positions=None):
    return make_alibi_entries(
        alibi, alibi_slopes(n_heads), positions, n_positions=n_positions or int(positions.max()) + 1,
        n_kv_heads=n_kv_heads or n_heads, score_scale=scale, dtype=dtype,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(6, 6), (6, 2), (71, 1), (8, 4)])
@pytest.mark.parametrize("n_positions", [1, 200, 2048, 70_000])
def test_entries_multiply_to_the_term(dtype, bfloat16, scaled, n_heads, n_kv_heads, n_positions):
    """Summed exactly: what the entries hold is the term to float32's precision, in half precision too."""
    if bfloat16 and dtype == torch.float16 and n_positions > 65_504:
        return
    positions = torch.arange(0, n_positions, max(1, n_positions // 300))[None]
    positions[0, -1] = n_positions - 1
    alibi, scale = AlibiPositions(bfloat16=bfloat16, scaled=scaled), 1 / 64**0.5 * 1.1
    entries = make_entries(alibi, n_heads, positions, dtype, scale=scale, n_kv_heads=n_kv_heads)
    assert entries.query.shape[-1] == entries.key.shape[-1]
    assert entries.key.shape[-1] % 8 == 0
    assert entries.key.dtype == entries.query.dtype == dtype
    key = entries.key.double()
    key = key.expand(-1, -1, n_heads, -1) if key.shape[2] == 1 else key.repeat_interleave(n_heads // key.shape[2], 2)
    found = (entries.query.double() * key).sum(-1) * scale
    term = alibi_term(alibi, alibi_slopes(n_heads), positions, scale, torch.float64)
    # Slopes over the scale are rounded to 24 bits; what float16 has below its smallest number adds an absolute error.
    torch.testing.assert_close(found, term, rtol=2**-23, atol=n_positions * 2**-25 if dtype == torch.float16 else 0)


def test_keys_of_a_group_are_not_repeated():
    positions = torch.arange(5)[None]
    assert make_entries(AlibiPositions(), 8, positions, torch.float32, n_kv_heads=2).key.shape == (1, 5, 1, 8)
    rounded = AlibiPositions(bfloat16=True, scaled=True)
    assert make_entries(rounded, 8, positions, torch.float32, n_kv_heads=2).key.shape == (1, 5, 2, 8)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-12),
        # Scores up to 700 are rounded to a few of float32's units.
        (torch.float32, 2e-4),
        # Half precision rounds q, k, v and the result: a few units in the last place of values around 1.
        (torch.bfloat16, 4 * 2**-8),
        (torch.float16, 4 * 2**-11),
    ],
)
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_folding_gives_the_biased_softmax(dtype, tolerance, n_kv_heads, bfloat16, edited):
    """A term rounded to half precision would be off by whole units; keys may have a head for each query head."""
    generator = torch.Generator().manual_seed(0)
    n_keys, scale = 300, 0.35
    key_heads = 4 if edited else n_kv_heads
    q, k, v = (
        torch.randn(2, n, heads, 8, generator=generator, dtype=torch.float64).to(dtype)
        for n, heads in ((n_keys, 4), (n_keys, key_heads), (n_keys, n_kv_heads))
    )
    positions, alibi = torch.arange(n_keys)[None], AlibiPositions(bfloat16=bfloat16)
    # float64 keeps the slopes as they are; the term for float32 is rounded where float32's scores are anyhow.
    term = alibi_term(alibi, alibi_slopes(4), positions, scale, torch.float64)
    wide_k, wide_v = k.double().repeat_interleave(4 // key_heads, 2), v.double().repeat_interleave(4 // n_kv_heads, 2)
    scores = torch.einsum("bqnh,bknh->bnqk", q.double(), wide_k) * scale + term.permute(0, 2, 1)[:, :, None]
    scores = scores.masked_fill(torch.ones(n_keys, n_keys).triu(1).bool(), -torch.inf)
    expected = torch.einsum("bnqk,bknh->bqnh", scores.softmax(-1), wide_v)
    entries = make_entries(alibi, 4, positions, dtype, scale=scale, n_kv_heads=n_kv_heads)
    folded = fold_into_heads(q, k, v, entries)
    found = attend(*folded, score_scale=scale, mask=None, is_causal=True)[..., :8]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_float32_scores_at_two_thousand_positions(device):
    """Scores, read off as the log-sum of a single key, are exact to a millionth of the largest."""
    n_keys, n_heads, scale = 2048, 4, 0.125
    q, k = torch.randn(1, 8, n_heads, 64), torch.randn(1, n_keys, 2, 64)
    positions = torch.arange(n_keys)[None]
    alibi, slopes = AlibiPositions(), alibi_slopes(n_heads)
    term = alibi_term(alibi, slopes, positions, scale, torch.float64)
    wide_k = k.double().repeat_interleave(2, 2)
    scores = torch.einsum("bqnh,bknh->bnqk", q.double(), wide_k) * scale + term.permute(0, 2, 1)[:, :, None]
    entries = make_entries(alibi, n_heads, positions, torch.float32, scale=scale, n_kv_heads=2)
    wide_q, wide_k, wide_v = (x.to(device) for x in fold_into_heads(q, k, torch.zeros_like(k), entries))
    for key in (0, 1, 1000, 2047):
        alone = wide_k[:, key : key + 1], wide_v[:, key : key + 1]
        _, found = attend_with_log_sum(wide_q, *alone, score_scale=scale, mask=None, is_causal=False)
        error = (found.cpu().double() - scores[..., key]).abs().max()
        assert error <= 1e-6 * scores.abs().max()


def test_operators_of_a_layer():
    """Two concatenations, a padding and three views; there were 25, some of them over a copy of the keys."""
    positions = torch.arange(6)[None]
    entries = make_entries(AlibiPositions(), 4, positions, torch.float32, n_kv_heads=2)
    q, k = torch.randn(2, 6, 4, 8), torch.randn(2, 6, 2, 8)
    with Dispatched() as dispatched:
        fold_into_heads(q, k, k, entries)
    assert dispatched.names == ["expand", "cat", "expand", "cat", "constant_pad_nd"]


class Dispatched(TorchDispatchMode):
    """The names of the operators that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))
