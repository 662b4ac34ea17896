"""Tests of hooklens.model.norm against the formula, in float64."""

import pytest
import torch

from hooklens.config import NormConfig
from hooklens.model.norm import Norm, NormSpec
from tests.model.networks import make_config

KINDS = {
    "layer": NormConfig(kind="layer", eps=1e-2),
    "layer, no bias": NormConfig(kind="layer", eps=1e-2, bias=False),
    "rms": NormConfig(kind="rms", eps=1e-2, bias=False),
    "rms, unit offset": NormConfig(kind="rms", eps=1e-2, bias=False, unit_offset=True),
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
