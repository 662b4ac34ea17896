"""Tests of hooklens.model.attention.kernels: what kernels would misread, half precision, and what is never made."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hooklens.errors import InputError
from hooklens.model.attention.attend import (
    additive_mask,
    attend,
    attend_in_parts,
    compute_pattern,
    compute_scores,
    weigh_values,
)
from hooklens.model.attention.kernels import Part
from tests.annotations import unchecked
from tests.model.attention.attention_by_hand import DEVICES, SCALE, Case, attend_by_hand, build
from tests.model.networks import Allocations


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_half_precision(dtype, device, softcap):
    case = build((2, 4, 2, 2, [(40, "keys", True, True), (4, "causal", False, False)], 3), device, dtype)
    wide = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    parts = [(k, v, hidden) for k, v, hidden in zip(wide[1::2], wide[2::2], case.hidden, strict=True)]
    expected, _ = attend_by_hand(wide[0], parts, score_scale=SCALE, softcap=softcap)
    found = attend_in_parts(case.q, case.parts, score_scale=SCALE, softcap=softcap)
    assert found.dtype == dtype
    # Rounded: each part's result, the pattern and the sum of both parts.
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected).to(dtype)
    grads = torch.autograd.grad((found * weights).sum(), case.leaves)
    expected_grads = torch.autograd.grad((expected * weights).sum(), wide)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # Sums over 8 rows of queries of products of the rounded numbers.
        torch.testing.assert_close(grad.double(), expected_grad, rtol=4 * tolerance, atol=4 * tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("tracked", [False, True])
def test_numbers_that_stand_for_many(device, dtype, tolerance, which, tracked):
    """A hook may return an expanded number. The CPU's kernel read what stood behind it: results were off by 15."""
    case = build((3, 4, 2, 1, [(6, "keys", True, False), (4, "causal", False, False)], 5), device, dtype)
    # Of a part: queries, keys or values that are one number, at a stride of 0 in every axis.
    shape = (case.q, case.parts[0].k, case.parts[0].v)[which].shape
    number = torch.tensor(0.3, device=device, dtype=dtype)
    q = number.expand(shape) if which == 0 else case.q
    parts = [part._replace(**{"kv"[which - 1]: number.expand(part.k.shape)}) if which else part for part in case.parts]
    by_hand = Case(q, parts, case.hidden)
    expected, _ = by_hand.by_hand(None)
    with torch.set_grad_enabled(tracked):
        found = attend_in_parts(q, parts, score_scale=SCALE)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        found = attend(
            q, *(x.expand(3, -1, -1, -1) for x in parts[0][:2]), score_scale=SCALE, mask=parts[0].mask, is_causal=False
        )
    alone, _ = Case(q, parts[:1], case.hidden[:1]).by_hand(None)
    torch.testing.assert_close(found, alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("stride", [2, 3])
def test_a_mask_with_gaps_between_its_keys(stride):
    """The CPU's kernel takes the keys of a mask to stand side by side."""
    q, k, v = (torch.randn(2, n, 3, 8) for n in (5, 7, 7))
    hidden = torch.rand(2, 1, 5, 7) < 0.4
    wide = torch.full((2, 1, 5, 7 * stride), -torch.inf)
    wide[..., ::stride] = additive_mask(hidden, torch.float32)
    expected, _ = attend_by_hand(q, [(k, v, hidden[:, 0])], score_scale=SCALE)
    with torch.no_grad():
        found = attend_in_parts(q, [Part(k, v, wide[..., ::stride])], score_scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_of_a_shared_past_hold_no_scores(softcap, monkeypatch):
    """They were all made and kept for the backward pass: rows x heads x queries x keys of every layer."""
    n_rows, n_query, n_past, n_heads = 20, 3, 300, 4
    monkeypatch.setattr("hooklens.model.attention.kernels._SCORES_AT_ONCE", 2**12)
    q, k, v = (torch.randn(n_rows, n_query, n_heads, 8, requires_grad=True) for _ in range(3))
    past_k, past_v = (torch.randn(1, n_past, n_heads, 8, requires_grad=True) for _ in range(2))
    with Allocations() as allocated:
        parts = [Part(past_k, past_v), Part(k, v, is_causal=True)]
        attend_in_parts(q, parts, score_scale=SCALE, softcap=softcap).square().sum().backward()
    largest = max(torch.Size(shape).numel() for _, shape in allocated.sizes)
    # Softly capped scores are made one query (of all rows and heads) at a time.
    assert largest <= max(q.numel(), past_k.numel(), n_heads * n_past if softcap else 0)
    assert all(tensor.grad is not None for tensor in (q, k, v, past_k, past_v))


@pytest.mark.parametrize("kind", ["causal", "keys", "queries"])
@pytest.mark.parametrize("n_kv_heads", [2, 6])
def test_groups_without_a_copy_of_many_keys(kind, n_kv_heads, monkeypatch):
    monkeypatch.setattr("hooklens.model.attention.grouping._FEW_NUMBERS", 0)
    case = build((2, 40, n_kv_heads, 4, [(40, kind, False, True)], 1), dtype=torch.float32)
    part = case.parts[0]
    with Allocations() as allocated, torch.no_grad():
        attend_in_parts(case.q, case.parts, score_scale=SCALE)
        attend(case.q, part.k, part.v, score_scale=SCALE, mask=part.mask, is_causal=part.is_causal)
    # Every query head with its own keys would be as large as the queries: none but their results are.
    of_keys = [name for name, shape in allocated.sizes if torch.Size(shape).numel() > case.q.numel()]
    assert of_keys == []


@pytest.mark.parametrize("shape", [(2, 5, 2, 8), (3, 5, 4, 8), (3, 5, 2, 4)])
def test_shapes_that_do_not_fit_are_refused(shape):
    """The kernel read past the end of the smaller tensor."""
    q, k = torch.randn(3, 2, 6, 8), torch.randn(shape)
    with unchecked(), pytest.raises(InputError, match=r"queries \[.*, keys \[.* expected \[rows pos heads d\]"):
        attend_in_parts(q, [Part(k, k)], score_scale=SCALE)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["open", "keys", "queries", "causal"])
@pytest.mark.parametrize("few", [0, 2**20])
@pytest.mark.parametrize(("n_kv_heads", "group"), [(4, 1), (2, 4), (6, 2)])
def test_half_precision_of_every_way_of_grouping(kind, device, few, n_kv_heads, group, monkeypatch):
    """CUDA's backward kernel takes the result to stand as it writes it: with other strides it was off by 1e35."""
    monkeypatch.setattr("hooklens.model.attention.grouping._FEW_NUMBERS", few)
    case = build((2, 70, n_kv_heads, group, [(70, kind, False, False)], 3), device, torch.bfloat16)
    wide = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    mask = additive_mask(case.hidden[0][:, None], torch.float64)
    scores = compute_scores(wide[0], wide[1], score_scale=SCALE, term=None, softcap=None, mask=mask)
    expected = weigh_values(compute_pattern(scores, can_hide_all=True), wide[2])
    found = attend_in_parts(case.q, case.parts, score_scale=SCALE)
    tolerance = 8 * torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(expected).to(torch.bfloat16)
    grads = torch.autograd.grad((found * weights).sum(), case.leaves)
    expected_grads = torch.autograd.grad((expected * weights).sum(), wide)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        # A key's gradient sums what 70 queries of a group add, each of them rounded.
        torch.testing.assert_close(grad.double(), expected_grad, rtol=4 * tolerance, atol=4 * tolerance)


class Names(TorchDispatchMode):
    """The names of all operators that run inside the block."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", ["open", "keys", "queries", "causal"])
@pytest.mark.parametrize("few", [0, 2**20])
def test_grouped_queries_stay_on_a_fused_kernel(dtype, device, kind, few, monkeypatch):
    """With a mask, or in float32, they made all scores on CUDA: its fused kernels want as many heads of keys."""
    monkeypatch.setattr("hooklens.model.attention.grouping._FEW_NUMBERS", few)
    case = build((2, 40, 2, 4, [(40, kind, False, False)], 3), device, dtype)
    part = case.parts[0]
    with Names() as seen:
        options = {"score_scale": SCALE, "mask": part.mask, "is_causal": part.is_causal}
        attend(case.q, part.k, part.v, **options).sum().backward()
        attend_in_parts(case.q, case.parts, score_scale=SCALE).sum().backward()
    assert any("scaled_dot_product" in name for name in seen.names)
    assert not {"bmm", "baddbmm", "matmul", "_softmax", "_safe_softmax", "exp"} & seen.names
