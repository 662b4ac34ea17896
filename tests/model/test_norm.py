"""Tests of hooklens.model.norm against the formula, in float64."""

import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from hooklens.config import NormConfig
from hooklens.errors import ConfigError
from hooklens.model.norm import Norm, NormSpec
from tests.model.networks import make_config

KINDS = {
    "layer": NormConfig(kind="layer", eps=1e-2),
    "layer, no bias": NormConfig(kind="layer", eps=1e-2, bias=False),
    "rms": NormConfig(kind="rms", eps=1e-2, bias=False),
    "rms, unit offset": NormConfig(kind="rms", eps=1e-2, bias=False, unit_offset=True),
    "layer, unit offset": NormConfig(kind="layer", eps=1e-2, unit_offset=True),
    "layer, wide weight": NormConfig(kind="layer", eps=1e-2, wide_weight=True),
    "rms, unit offset, wide weight": NormConfig(kind="rms", eps=1e-2, bias=False, unit_offset=True, wide_weight=True),
}


@pytest.fixture(params=KINDS)
def norm(request):
    cfg = make_config(d_model=6, n_heads=2)
    norm = Norm(NormSpec(cfg=cfg, norm=KINDS[request.param], axes="batch pos d_model", where="a norm")).double()
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    return norm


def by_formula(norm, x):
    if norm.norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    scale = ((x * x).sum(-1, keepdim=True) / 6 + norm.norm.eps) ** 0.5
    gain = norm.w + 1 if norm.norm.unit_offset else norm.w
    return x / scale * gain + (0 if norm.b is None else norm.b), scale, x / scale


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 3, 4, 6)])
def test_formula_and_side_tensors(norm, shape):
    x = torch.randn(shape, dtype=torch.float64)
    expected, scale, normalized = by_formula(norm, x)
    with norm.capture() as captured:
        watched = norm(x)
    # 1e-12: float64 sums in another order.
    torch.testing.assert_close(watched, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(captured["hook_scale"], scale, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(captured["hook_normalized"], normalized, rtol=1e-12, atol=1e-12)
    assert torch.equal(watched, norm(x))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("point", ["hook_scale", "hook_normalized"])
def test_edits_of_side_tensors_are_seen(norm, point, in_place, mode):
    """Under inference_mode tensors have no version counter, and in-place edits went unseen."""

    def edit(tensor, hook):
        if not in_place:
            return tensor * 2
        tensor.mul_(2)

    x = torch.randn(2, 3, 6, dtype=torch.float64)
    _, _, normalized = by_formula(norm, x)
    gain = norm.w + 1 if norm.norm.unit_offset else norm.w
    expected = normalized * (0.5 if point == "hook_scale" else 2) * gain + (0 if norm.b is None else norm.b)
    with mode():
        out = norm.run_with_hooks(x, fwd_hooks=[(point, edit)])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(norm, dtype):
    norm.to(dtype)
    x = torch.randn(2, 3, 6).to(dtype)
    _, scale, normalized = by_formula(norm, x.float())
    with norm.capture() as captured:
        out = norm(x)
    assert out.dtype == captured["hook_normalized"].dtype == dtype
    assert captured["hook_scale"].dtype == torch.float32
    torch.testing.assert_close(captured["hook_scale"], scale, rtol=1e-6, atol=1e-6)
    assert torch.equal(captured["hook_normalized"], normalized.to(dtype))


def test_gradients_reach_the_side_tensors(norm):
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    with norm.capture("hook_normalized", incl_bwd=True) as captured:
        norm(x).sum().backward()
    gain = norm.w + 1 if norm.norm.unit_offset else norm.w
    torch.testing.assert_close(captured["hook_normalized_grad"], gain.detach().expand(2, 3, 6))


def test_initialize_makes_it_a_plain_norm(norm):
    norm.initialize()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(norm(x), by_formula(norm, x)[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wide_weight_is_gemmas(dtype):
    """`1 + w` was made in half precision, where it keeps 8 bits of a number near 1."""
    cfg = make_config(d_model=64, n_heads=2)
    theirs = GemmaRMSNorm(64, eps=1e-6).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        theirs.weight.copy_(0.3 * torch.randn(64, generator=generator))
    x = torch.randn(3, 50, 64, generator=generator).to(dtype)
    found = {}
    for wide in (True, False):
        kind = NormConfig(kind="rms", eps=1e-6, bias=False, unit_offset=True, wide_weight=wide)
        ours = Norm(NormSpec(cfg=cfg, norm=kind, axes="batch pos d_model", where="a norm")).to(dtype)
        ours.load_state_dict({"w": theirs.weight})
        found[wide] = ours(x)
        # An edit goes through the same weight; the shown tensor has been rounded, so two roundings may differ.
        edited = ours.run_with_hooks(x, fwd_hooks=[("hook_normalized", lambda tensor, hook: tensor.clone())])
        assert edited.dtype == dtype
        torch.testing.assert_close(edited, found[wide], rtol=4 * torch.finfo(dtype).eps, atol=0)
    expected = theirs(x)
    # The reciprocal root is taken in one step or two, which moves few roundings to the neighbouring number.
    assert float((found[True] != expected).double().mean()) < 0.01
    assert float((found[False] != expected).double().mean()) > 0.1


def test_settings_that_have_no_effect_are_refused():
    with pytest.raises(ConfigError, match="wide_weight=True is how weight and bias act: it needs one of them"):
        NormConfig(kind="rms", eps=1e-5, weight=False, bias=False, wide_weight=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 6), (2, 3, 6), (2, 3, 4, 6)])
def test_a_watched_norm_gives_the_front_doors_numbers(norm, shape, dtype):
    """The operator that gives the denominator with the result is another one than the plain call's."""
    norm, x = norm.to(dtype), torch.randn(shape, dtype=dtype)
    with torch.no_grad():
        plain = norm(x)
        with norm.capture() as captured:
            assert torch.equal(norm(x), plain)
        by_hook = norm.run_with_hooks(x, fwd_hooks=[("hook_scale", lambda scale, hook: None)])
    assert torch.equal(by_hook, plain)
    assert captured["hook_scale"].shape == (*shape[:-1], 1)


@pytest.mark.parametrize("watched", [False, True])
def test_a_watched_norm_refuses_other_widths(watched):
    """The operator with the denominator checks less than the front door does."""
    spec = NormSpec(cfg=make_config(d_model=6, n_heads=2), norm=KINDS["rms"], axes="batch pos d_model", where="a norm")
    norm, x = Norm(spec), torch.randn(2, 3, 1)
    hooks = [("hook_scale", lambda scale, hook: None)] if watched else []
    with torch.no_grad(), pytest.raises(RuntimeError, match="normalized_shape"):
        norm.run_with_hooks(x, fwd_hooks=hooks)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_vectors_that_a_listener_leaves_keep_every_bit(norm, dtype, mode):
    """An equal copy made the whole output anew, by other sums; so did a gradient that was asked for."""
    norm.to(dtype)
    x = torch.randn(2, 3, 6).to(dtype).requires_grad_()

    def change_one(tensor, hook):
        tensor = tensor.clone()
        tensor[1, 2] += 1
        return tensor

    with mode():
        out = norm(x)
        assert torch.equal(norm.run_with_hooks(x, fwd_hooks=[("hook_normalized", lambda one, hook: one.clone())]), out)
        edited = norm.run_with_hooks(x, fwd_hooks=[("hook_normalized", change_one)])
    assert torch.equal(edited[0], out[0])
    assert torch.equal(edited[1, :2], out[1, :2])
    assert not torch.allclose(edited[1, 2], out[1, 2], atol=1e-3)


def test_gradients_through_an_equal_copy_are_those_of_the_norm(norm):
    found = []
    for hooks in ([], [("hook_normalized", lambda one, hook: one * 1.0)]):
        x = torch.randn(2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = norm.run_with_hooks(x, fwd_hooks=hooks)
        found.append(torch.autograd.grad((out * torch.arange(6)).pow(2).sum(), [x, *norm.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_copy_of_what_was_changed_in_place_is_a_change(norm):
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    _, _, normalized = by_formula(norm, x)
    gain = norm.w + 1 if norm.norm.unit_offset else norm.w
    expected = normalized * 2 * gain + (0 if norm.b is None else norm.b)
    out = norm.run_with_hooks(x, fwd_hooks=[("hook_normalized", lambda one, hook: one.mul_(2).clone())])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
