"""Tests of hooklens.model.activations against transformers and the formulas written out."""

import math
import re

import pytest
import torch
from transformers.activations import ACT2FN, XIELUActivation

from hooklens import HookedCausalLM
from hooklens.config import NormConfig
from hooklens.errors import ConfigError
from hooklens.model.activations import ACTIVATIONS, xielu
from hooklens.model.mlp import MLP
from tests.model.networks import RMS_NORM, make_config


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("relu", "relu"), ("relu2", "relu2"), ("gelu", "gelu"), ("gelu_tanh", "gelu_new"),
        ("gelu_tanh", "gelu_pytorch_tanh"), ("gelu_quick", "quick_gelu"), ("silu", "silu"),
    ],
)  # fmt: skip
def test_activations_against_transformers(ours, theirs):
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[ours](x), ACT2FN[theirs](x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_gives_a_tensor_of_its_own(name):
    """The identity gave back what went in: neurons edited in place at `hook_post` changed what `hook_pre` had shown."""
    x = torch.linspace(-6, 6, 101)
    before = x.clone()
    ACTIVATIONS[name](x).zero_()
    assert torch.equal(x, before)


def test_gelu_is_the_exact_one():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    exact = [t * 0.5 * (1 + math.erf(t / 2**0.5)) for t in x.tolist()]
    assert ACTIVATIONS["gelu"](x).tolist() == pytest.approx(exact, abs=1e-12)


def test_names_of_the_tanh_approximation_are_one():
    for name in ("gelu_new", "gelu_fast"):
        x = torch.linspace(-6, 6, 101, dtype=torch.float32)
        torch.testing.assert_close(ACTIVATIONS["gelu_tanh"](x), ACT2FN[name](x), rtol=2e-6, atol=1e-6)
        assert make_config(act_fn=name) == make_config(act_fn="gelu_tanh")


def test_xielu_against_transformers():
    theirs = XIELUActivation(alpha_p_init=0.4, alpha_n_init=1.3, dtype=torch.float64)
    x = torch.linspace(-6, 6, 101, dtype=torch.float64)
    # The other one adds its 1/2 in bfloat16, which is exact for it.
    found = xielu(x, theirs.alpha_p.detach(), theirs.alpha_n.detach())
    torch.testing.assert_close(found, theirs._xielu_python(x).detach(), rtol=1e-12, atol=1e-12)


def test_fresh_weights_of_xielu():
    """Both curvatures start at 0.8."""
    model = HookedCausalLM(make_config(act_fn="xielu"))
    theirs = XIELUActivation(dtype=torch.float32)
    for block in model.block_list():
        torch.testing.assert_close(block.mlp.alpha_p, theirs.alpha_p)
        torch.testing.assert_close(block.mlp.alpha_n, theirs.alpha_n)


@pytest.mark.parametrize("bias", [True, False])
def test_solu_with_its_norm(bias):
    """As in TransformerLens: `hook_mid` between the activation and a LayerNorm of the neurons, `ln`."""
    norm = NormConfig(kind="layer", eps=1e-3, weight=bias, bias=bias)
    mlp = MLP(make_config(act_fn="solu_ln", norm=norm).block(0)).double()
    for parameter in mlp.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    pre = x @ mlp.W_in + mlp.b_in
    mid = pre * pre.exp() / pre.exp().sum(-1, keepdim=True)
    centred = mid - mid.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    post = centred / scale * mlp.ln.w + mlp.ln.b if bias else centred / scale
    expected = {"hook_pre": pre, "hook_mid": mid, "ln.hook_scale": scale, "ln.hook_normalized": centred / scale}
    with mlp.capture() as captured:
        out = mlp(x)
    assert set(captured) == {*expected, "hook_post"}
    for name, tensor in {**expected, "hook_post": post}.items():
        torch.testing.assert_close(captured[name], tensor, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, post @ mlp.W_out + mlp.b_out, rtol=1e-12, atol=1e-12)


def test_the_norm_of_the_neurons_follows_the_networks():
    given = NormConfig(kind="layer", eps=1e-3)
    assert make_config(act_fn="solu_ln", norm=given).act_norm == given
    assert make_config(act_fn="solu_ln", norm=RMS_NORM).act_norm == NormConfig(kind="layer", eps=1e-5)
    assert make_config(act_fn="solu_ln", act_norm=RMS_NORM).act_norm == RMS_NORM
    assert make_config(act_fn="solu_ln").replace(act_fn="solu").act_norm is None
    assert make_config(act_fn="solu").act_norm is None


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"act_fn": "solu_ln", "gated_mlp": True}, "without gate; set gated_mlp=False"),
        ({"act_fn": "solu", "act_norm": RMS_NORM}, "act_norm is the norm of act_fn='solu_ln', and act_fn is 'solu'"),
        ({"act_fn": "clamped_swiglu"}, "it needs gated_mlp=True"),
        ({"swiglu_limit": 2.0}, "swiglu_limit belong to act_fn='clamped_swiglu', and act_fn is 'gelu'"),
        ({"act_fn": "clamped_swiglu", "gated_mlp": True, "swiglu_limit": -1.0}, "swiglu_limit=-1.0; expected finite"),
    ],
)
def test_settings_that_do_not_go_with_an_activation_are_refused(changes, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        make_config(**changes)
