"""Tests of hooklens.model.mlp against the formulas written out."""

import pytest
import torch

from hooklens.model.mlp import MLP
from tests.model.networks import make_config


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_formula_and_points(gated, bias):
    mlp = MLP(make_config(gated_mlp=gated, mlp_bias=bias, act_fn="silu").block(0)).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    linear = x @ mlp.W_in + (mlp.b_in if bias else 0)
    pre = x @ mlp.W_gate + (mlp.b_gate if bias else 0) if gated else linear
    post = pre / (1 + (-pre).exp()) * (linear if gated else 1)
    expected = {"hook_pre": pre, "hook_post": post, **({"hook_pre_linear": linear} if gated else {})}
    with mlp.capture() as captured:
        out = mlp(x)
    assert set(captured) == set(expected)
    for name, tensor in captured.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, post @ mlp.W_out + (mlp.b_out if bias else 0), rtol=1e-12, atol=1e-12)
    silenced = mlp.run_with_hooks(x, fwd_hooks=[("hook_post", lambda t, hook: t * 0)])
    torch.testing.assert_close(silenced, mlp.b_out.expand_as(x) if bias else torch.zeros_like(x))
