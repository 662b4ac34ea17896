"""Tests of hooklens.model.attention.attend: every way against attention computed one query at a time."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hooklens.errors import InputError
from hooklens.model.attention.attend import (
    additive_mask,
    attend,
    attend_explicitly,
    attend_in_parts,
    attend_with_log_sum,
    compute_pattern,
    compute_scores,
    merge_parts,
    weigh_values,
)
from hooklens.model.attention.kernels import Part
from tests.benchmarks.peak import run_fresh
from tests.model.attention.attention_by_hand import DEVICES, SCALE, Case, attend_by_hand, build, cases
from tests.model.networks import ALL_CONFIGS, make_model, pad_rows, random_tokens
from tests.torch_version import traces_whole


def check(case: Case, found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Results and gradients agree; they are exactly 0 for a query that sees no key and a key that no query sees."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.randn(found.shape, dtype=torch.float64).to(found)
    grads = torch.autograd.grad((found * weights).sum(), case.leaves, materialize_grads=True)
    expected_grads = [torch.zeros_like(leaf) for leaf in case.leaves]
    if expected.requires_grad:
        expected_grads = torch.autograd.grad(
            (expected * weights).sum(), case.leaves, materialize_grads=True, retain_graph=True
        )
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=10 * tolerance, atol=10 * tolerance)
    blind = torch.cat(case.hidden, -1).all(-1)
    assert not found[blind].any()
    assert not grads[0][blind].any()
    for of_k, of_v, hidden in zip(grads[1::2], grads[2::2], case.hidden, strict=True):
        unseen = hidden.all(1) if len(of_k) > 1 else hidden.all(1).all(0)[None]
        assert not of_k[unseen].any()
        assert not of_v[unseen].any()


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("small", [0, 2**24])
@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_parts(device, dtype, tolerance, softcap, small, case):
    """A query that saw no key gave NaN gradients, also in the middle of a batch."""
    with pytest.MonkeyPatch.context() as patch:
        # Keys few enough to be repeated for each query head, and all queries in one chunk; or neither.
        patch.setattr("hooklens.model.attention.kernels._SCORES_AT_ONCE", small)
        patch.setattr("hooklens.model.attention.grouping._FEW_NUMBERS", small)
        built = build(case, device, dtype)
        expected, _ = built.by_hand(softcap)
        found = attend_in_parts(built.q, built.parts, score_scale=SCALE, softcap=softcap)
        check(built, found, expected, tolerance)
        with torch.no_grad():
            again = attend_in_parts(built.q, built.parts, score_scale=SCALE, softcap=softcap)
    assert torch.equal(again, found)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("softcap", [None, 0.8])
@settings(deadline=None, max_examples=60)
@given(case=cases(max_parts=1))
def test_whole(device, dtype, tolerance, softcap, case):
    """The fused kernel, the log-sum beside it, and scores, pattern and values one by one."""
    built = build(case, device, dtype)
    part = built.parts[0]
    k, v = (x.expand(len(built.q), -1, -1, -1) for x in (part.k, part.v))
    expected, expected_sum = built.by_hand(softcap)
    options = {"score_scale": SCALE, "mask": part.mask, "is_causal": part.is_causal, "softcap": softcap}
    check(built, attend(built.q, k, v, **options), expected, tolerance)

    z, log_sum = attend_with_log_sum(built.q, k, v, **options)
    check(built, z, expected, tolerance)
    torch.testing.assert_close(log_sum, expected_sum, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        z, log_sum = attend_with_log_sum(built.q, k, v, **options)
        torch.testing.assert_close(z, expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(log_sum, expected_sum, rtol=tolerance, atol=tolerance)

    mask = additive_mask(built.hidden[0][:, None], dtype)
    scores = compute_scores(built.q, k, score_scale=SCALE, term=None, softcap=softcap, mask=mask)
    check(built, weigh_values(compute_pattern(scores, can_hide_all=True), v), expected, tolerance)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), DEVICES)
@pytest.mark.parametrize("softcap", [None, 0.8])
@settings(deadline=None, max_examples=30)
@given(case=cases())
def test_sinks(device, dtype, tolerance, softcap, case):
    """Sinks are one more key for every query, whose value is 0; by hand they are just that."""
    built = build(case, device, dtype)
    n_heads = built.q.shape[2]
    sinks = torch.linspace(-1.0, 2.0, n_heads, dtype=torch.float64).to(device, dtype).requires_grad_()
    z, log_sum = built.by_hand(softcap)
    total = torch.logaddexp(log_sum, sinks[:, None])
    # A query that sees nothing has a log-sum of -inf, through which no gradient goes.
    blind = log_sum == -torch.inf
    share = torch.where(blind, 0.0, (log_sum.masked_fill(blind, 0.0) - total.masked_fill(blind, 0.0)).exp())
    expected = z * share.transpose(1, 2)[..., None]
    found = attend_in_parts(built.q, built.parts, score_scale=SCALE, softcap=softcap, sinks=sinks)
    weights, kept = torch.randn(found.shape, dtype=torch.float64).to(found), {"retain_graph": True}
    [grad] = torch.autograd.grad((found * weights).sum(), [sinks], **kept)
    expected_grad = torch.zeros_like(sinks)
    if expected.requires_grad:
        [expected_grad] = torch.autograd.grad((expected * weights).sum(), [sinks], materialize_grads=True, **kept)
    torch.testing.assert_close(grad, expected_grad, rtol=10 * tolerance, atol=10 * tolerance)
    check(built, found, expected, tolerance)

    explicit = attend_explicitly(built.q, built.parts, score_scale=SCALE, softcap=softcap, sinks=sinks)
    torch.testing.assert_close(explicit, expected.to(explicit), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("softcap", [None, 0.8])
@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_merging_by_hand(softcap, case):
    """Gradients through the log-sums of parts of which one or both are empty."""
    built = build(case)
    if len(built.parts) < 2:
        return
    results = [
        attend_with_log_sum(
            built.q, *(x.expand(len(built.q), -1, -1, -1) for x in (part.k, part.v)),
            score_scale=SCALE, mask=part.mask, is_causal=part.is_causal, softcap=softcap,
        )
        for part in built.parts
    ]  # fmt: skip
    check(built, merge_parts(*results), built.by_hand(softcap)[0], 1e-12)


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


def test_dtypes_that_differ_are_refused():
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 2, 8, dtype=torch.float64)
    with pytest.raises(
        InputError, match=r"queries of torch.float32 and keys and values of torch.float64; expected one"
    ):
        attend_in_parts(q, [Part(k, k)], score_scale=SCALE)
    with torch.autocast("cpu", torch.bfloat16):
        assert attend_in_parts(q, [Part(k, k)], score_scale=SCALE).dtype == torch.bfloat16


def test_values_with_one_row_beside_keys_with_many():
    q, k, v = torch.randn(3, 2, 2, 8), torch.randn(3, 4, 2, 8), torch.randn(1, 4, 2, 8)
    hidden = torch.zeros(3, 2, 4, dtype=torch.bool)
    expected, _ = attend_by_hand(q, [(k, v.expand(3, -1, -1, -1), hidden)], score_scale=SCALE)
    found = attend_in_parts(q, [Part(k, v)], score_scale=SCALE)
    torch.testing.assert_close(found, expected, rtol=4e-6, atol=4e-6)


class Reads(TorchDispatchMode):
    """Refuses every operator that hands a number of a tensor to Python, which waits for an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("softcap", [None, 0.8])
@pytest.mark.parametrize("tracked", [False, True])
def test_nothing_is_read_back(softcap, tracked):
    case = build((2, 4, 2, 2, [(5, "queries", True, False), (4, "causal", False, False)], 3))
    with Reads(), torch.set_grad_enabled(tracked):
        z = attend_in_parts(case.q, case.parts, score_scale=SCALE, softcap=softcap)
        if tracked:
            z.sum().backward()


@pytest.mark.long
@traces_whole
def test_compiled_whole():
    """In a process of its own: torch.compile cannot see through the checks of annotations that tests run under."""
    code = """
        import torch
        from hooklens.model.attention.attend import additive_mask, attend, attend_in_parts
        from hooklens.model.attention.kernels import Part

        torch.manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        leaves = draw(2, 4, 4, 8), draw(1, 5, 2, 8), draw(1, 5, 2, 8), draw(2, 4, 2, 8), draw(2, 4, 2, 8)
        mask = additive_mask(torch.rand(2, 1, 4, 5) < 0.5, torch.float64)

        def in_parts(q, past_k, past_v, k, v, softcap):
            parts = [Part(past_k, past_v, mask), Part(k, v, is_causal=True)]
            return attend_in_parts(q, parts, score_scale=0.7, softcap=softcap)

        def causal(q, past_k, past_v, k, v, softcap):
            return attend(q, k, v, score_scale=0.7, mask=None, is_causal=True, softcap=softcap)

        for run in (in_parts, causal):
            for softcap in (None, 0.8):
                compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
                with torch.no_grad():
                    torch.testing.assert_close(compiled(*leaves, softcap), run(*leaves, softcap))
                found, expected = compiled(*leaves, softcap), run(*leaves, softcap)
                used = leaves if run is in_parts else leaves[:1] + leaves[3:]
                grads = [torch.autograd.grad(z.square().sum(), used) for z in (found, expected)]
                torch.testing.assert_close(*grads)
        print("compiled")
    """
    assert run_fresh(code) == "compiled"


@pytest.mark.parametrize("softcap", [None, 0.8])
def test_function_transforms(softcap):
    """Per-row gradients of a shared past, and the plain causal way under vmap."""
    case = build((3, 4, 2, 2, [(5, "keys", True, True), (4, "causal", False, False)], 3))
    past, new = case.parts

    def loss(past_k, q, k, v):
        parts = [past._replace(k=past_k), new._replace(k=k[None], v=v[None])]
        return attend_in_parts(q[None], parts, score_scale=SCALE, softcap=softcap).square().sum()

    leaves = [x.detach() for x in (past.k, case.q, new.k, new.v)]
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(*leaves)
    for row in range(3):
        past_k = leaves[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(past_k, *(x[row] for x in leaves[1:])), past_k)
        torch.testing.assert_close(found[row], expected, rtol=1e-11, atol=1e-11)

    def causal(q, k, v):
        return attend(q, k, v, score_scale=SCALE, mask=None, is_causal=True, softcap=softcap)

    stacked = [torch.stack([x, x * 2]) for x in leaves[1:]]
    found = torch.func.vmap(causal)(*stacked)
    for i in range(2):
        torch.testing.assert_close(found[i], causal(*(x[i] for x in stacked)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("network", ALL_CONFIGS)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_gradients_of_left_padded_rows(network, frozen, edited):
    """Padding sees no key: weights got NaN gradients on a frozen prefix, with a soft cap and with an edited pattern."""
    model = make_model(network)
    rows = [random_tokens(1, n, seed=n)[0] for n in (2, 5, 6)]
    prefix = random_tokens(1, 3, seed=9)
    ids, mask = pad_rows(rows, "left")
    padded_prefix = torch.nn.functional.pad(prefix, (1, 0))

    def gradients(padded):
        model.zero_grad()
        batches = [(ids, mask)] if padded else [(row[None], torch.ones(1, len(row))) for row in rows]
        for tokens, own_mask in batches:
            kv = None
            if frozen and padded:
                kv = model.prefill(padded_prefix, attention_mask=torch.tensor([[0, 1, 1, 1]]))
            elif frozen:
                kv = model.prefill(prefix)
            hooks = [("blocks.*.attn.hook_pattern", lambda pattern, hook: pattern * 0.5)] if edited else []
            with model.hooks(fwd_hooks=hooks):
                logits = model(tokens, attention_mask=own_mask, past_kv_cache=kv)
            logits[own_mask.bool()].square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    # float64 sums over rows in another order.
    torch.testing.assert_close(gradients(padded=True), gradients(padded=False), rtol=1e-9, atol=1e-9)
