"""Mixture layers against the modules of transformers, with the same random weights.

Routers of transformers take softmax or sigmoid in float32 also in a float64 model, so agreement ends there; the
tests by hand go further.
"""

import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    PhimoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.phimoe.modeling_phimoe import PhimoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hooklens import MoEConfig
from hooklens.model import MoE
from tests.model.moe.layers import D_MODEL, make_layer, random_stream

SIZES = {"n_experts": 8, "experts_per_token": 2, "d_expert": 10}
_THEIRS = {"hidden_size": D_MODEL, "num_attention_heads": 2, "num_experts_per_tok": 2, "hidden_act": "silu"}


def _mixtral():
    config = MixtralConfig(**_THEIRS, num_local_experts=8, intermediate_size=10)
    return MixtralSparseMoeBlock(config), MoEConfig(**SIZES, gate_norm=1.0)


def _qwen2(*, normed):
    config = Qwen2MoeConfig(**_THEIRS, num_experts=8, moe_intermediate_size=10, shared_expert_intermediate_size=14,
                            norm_topk_prob=normed)  # fmt: skip
    ours = MoEConfig(**SIZES, gate_norm=1.0 if normed else None, d_shared=14, shared_gate=True)
    return Qwen2MoeSparseMoeBlock(config), ours


def _qwen3(*, normed):
    config = Qwen3MoeConfig(**_THEIRS, num_experts=8, moe_intermediate_size=10, norm_topk_prob=normed)
    return Qwen3MoeSparseMoeBlock(config), MoEConfig(**SIZES, gate_norm=1.0 if normed else None)


def _deepseek2(method):
    config = DeepseekV2Config(**_THEIRS, n_routed_experts=8, moe_intermediate_size=10, n_shared_experts=2,
                              routed_scaling_factor=1.7, topk_method=method, n_group=4, topk_group=2)  # fmt: skip
    groups = {"n_groups": 4, "groups_per_token": 2} if method == "group_limited_greedy" else {}
    return DeepseekV2Moe(config), MoEConfig(**SIZES, gate_scale=1.7, d_shared=20, router_float32=True, **groups)


def _deepseek3(*, normed):
    config = DeepseekV3Config(**_THEIRS, n_routed_experts=8, moe_intermediate_size=10, n_shared_experts=1,
                              routed_scaling_factor=2.5, n_group=4, topk_group=2, norm_topk_prob=normed)  # fmt: skip
    ours = MoEConfig(
        **SIZES, router="sigmoid", choice_bias=True, gate_norm=1.0 if normed else None, gate_scale=2.5, n_groups=4,
        groups_per_token=2, group_top=2, d_shared=10, router_float32=True,
    )  # fmt: skip
    return DeepseekV3MoE(config), ours


def _gpt_oss():
    config = GptOssConfig(**_THEIRS, num_local_experts=8, intermediate_size=10)
    ours = MoEConfig(**SIZES, gate_norm=1.0, router_bias=True, expert_bias=True, act_fn="clamped_swiglu")
    return GptOssMLP(config), ours


def _llama4(k):
    config = Llama4TextConfig(**{**_THEIRS, "num_experts_per_tok": k}, num_local_experts=8, intermediate_size=10)
    ours = MoEConfig(**{**SIZES, "experts_per_token": k}, router="sigmoid_input", d_shared=10)
    return Llama4TextMoe(config), ours


def _phimoe(eps):
    config = PhimoeConfig(**_THEIRS, num_local_experts=8, intermediate_size=10, router_jitter_noise=eps)
    return PhimoeSparseMoeBlock(config), MoEConfig(**SIZES, router="sparsemixer", sparsemixer_eps=eps)


PAIRS = {
    "mixtral": _mixtral,
    "qwen2_moe": lambda: _qwen2(normed=False),
    "qwen2_moe, renormalised": lambda: _qwen2(normed=True),
    "qwen3_moe": lambda: _qwen3(normed=False),
    "qwen3_moe, renormalised": lambda: _qwen3(normed=True),
    "deepseek_v2": lambda: _deepseek2("greedy"),
    "deepseek_v2, groups": lambda: _deepseek2("group_limited_greedy"),
    "deepseek_v3": lambda: _deepseek3(normed=True),
    "deepseek_v3, not renormalised": lambda: _deepseek3(normed=False),
    "gpt_oss": _gpt_oss,
    "llama4, one expert": lambda: _llama4(1),
    "llama4, two experts": lambda: _llama4(2),
    "phimoe": lambda: _phimoe(0.01),
    "phimoe, wide": lambda: _phimoe(0.4),
}


def _make_pair(name, dtype) -> tuple[nn.Module, MoE]:
    theirs, mixture = PAIRS[name]()
    for module in theirs.modules():
        if hasattr(module, "config"):
            module.config._experts_implementation = "eager"
    theirs = theirs.to(dtype).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            tensor.copy_(0.7 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    ours = make_layer(mixture, dtype=dtype)
    with torch.no_grad():
        _copy_weights(theirs, ours)
    return theirs, ours


def _copy_weights(theirs: nn.Module, ours: MoE) -> None:
    state = theirs.state_dict()
    router = "router" if any(name.startswith("router.") for name in state) else "gate"
    ours.W_router = state[f"{router}.weight"].T
    if ours.b_router is not None:
        ours.b_router = state[f"{router}.bias"]
    if ours.b_choice is not None:
        ours.b_choice.copy_(state["gate.e_score_correction_bias"])
    gate_up, down = state["experts.gate_up_proj"], state["experts.down_proj"]
    if gate_up.shape[1] != D_MODEL:
        gate_up, down = gate_up.mT, down.mT
    interleaved = "experts.gate_up_proj_bias" in state
    halves = (gate_up[..., ::2], gate_up[..., 1::2]) if interleaved else gate_up.chunk(2, -1)
    for name, tensor in zip(("W_gate", "W_in", "W_out"), (*halves, down), strict=True):
        getattr(ours, name).copy_(tensor)
    if interleaved:
        biases = state["experts.gate_up_proj_bias"]
        for name, tensor in zip(
            ("b_gate", "b_in", "b_out"), (biases[:, ::2], biases[:, 1::2], state["experts.down_proj_bias"]), strict=True
        ):
            getattr(ours, name).copy_(tensor)
    if ours.shared is not None:
        shared = "shared_experts" if "shared_experts.up_proj.weight" in state else "shared_expert"
        for name, module in (("W_gate", "gate_proj"), ("W_in", "up_proj"), ("W_out", "down_proj")):
            setattr(ours.shared, name, state[f"{shared}.{module}.weight"].T)
        if ours.shared.is_gated:
            ours.shared.W_shared_gate = state["shared_expert_gate.weight"].T


@pytest.mark.parametrize("name", PAIRS)
def test_output_is_that_of_transformers(name):
    theirs, ours = _make_pair(name, torch.float32)
    x = random_stream(3, 16, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(x)
        found = ours(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    # float32 rounding of sums over some ten numbers of size one.
    torch.testing.assert_close(found, expected.view_as(found), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "phimoe"])
def test_gradients_are_those_of_transformers(name):
    theirs, ours = _make_pair(name, torch.float32)
    x, x_theirs = (random_stream(2, 9, dtype=torch.float32).requires_grad_() for _ in range(2))
    found, expected = ours(x), theirs(x_theirs)
    expected = expected[0] if isinstance(expected, tuple) else expected
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weights).sum().backward()
    (expected.view_as(found) * weights).sum().backward()
    torch.testing.assert_close(x.grad, x_theirs.grad, rtol=1e-4, atol=1e-5)
    down = theirs.experts.down_proj.grad
    torch.testing.assert_close(ours.W_out.grad, down if name == "gpt_oss" else down.mT, rtol=1e-4, atol=1e-5)
    router = getattr(theirs, "router", None) or theirs.gate
    torch.testing.assert_close(ours.router_proj.weight.grad, router.weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe, renormalised", "deepseek_v3", "gpt_oss"])
def test_bfloat16_is_as_near_to_float32_as_transformers(name):
    """The experts chosen are the same; what is left is the rounding of half precision, on both sides alike."""
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        theirs, ours = _make_pair(name, dtype)
        x = random_stream(2, 64, dtype=torch.bfloat16).to(dtype)
        with torch.no_grad():
            expected = theirs(x)
            made = {"theirs": expected[0] if isinstance(expected, tuple) else expected, "ours": ours(x)}
        if dtype == torch.float32:
            exact = made["ours"]
        else:
            # Tokens whose best experts are as good as equal go elsewhere in either; the median leaves them out.
            errors = {who: (out.view_as(exact).float() - exact).abs().median() for who, out in made.items()}
    assert errors["ours"] <= 1.25 * errors["theirs"]
