"""Mixtures of experts: what more experts cost at a fixed number for each token, and the layers of transformers."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from hooklens import HookedConfig, MoEConfig, NoPositions
from hooklens.model import MoE
from tests.benchmarks.alternate import time_alternating

D_MODEL, D_EXPERT = 256, 256


def _make_ours(n_experts: int, k: int) -> MoE:
    mixture = MoEConfig(n_experts=n_experts, experts_per_token=k, d_expert=D_EXPERT, gate_norm=1.0)
    cfg = HookedConfig(
        d_model=D_MODEL,
        n_layers=1,
        n_heads=4,
        d_vocab=2,
        n_ctx=4096,
        positions=NoPositions(),
        act_fn="silu",
        mlp=mixture,
    )
    return _randomise(MoE(cfg.block(0).of(mixture)))


def _make_theirs(family: str, n_experts: int, k: int) -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "num_attention_heads": 4, "num_experts_per_tok": k}
    if family == "mixtral":
        config = MixtralConfig(**sizes, num_local_experts=n_experts, intermediate_size=D_EXPERT)
        block: type[nn.Module] = MixtralSparseMoeBlock
    else:
        config = Qwen3MoeConfig(**sizes, num_experts=n_experts, moe_intermediate_size=D_EXPERT, norm_topk_prob=True)
        block = Qwen3MoeSparseMoeBlock
    # What a loaded model has by default.
    config._experts_implementation = "grouped_mm"
    return _randomise(block(config)).eval()


@torch.no_grad()
def _randomise(module: Any) -> Any:
    for parameter in module.parameters():
        parameter.normal_(0, 0.02)
    return module


@torch.no_grad()
def test_more_experts_at_a_fixed_number_for_each_token(benchmark: Any, record: Any, one_thread: None) -> None:
    """1 x 2048 tokens, two experts each. All experts on all tokens would cost eight times as much with 64 as with 8."""
    layers = {n: _make_ours(n, 2) for n in (8, 16, 32, 64)}
    x = torch.randn(1, 2048, D_MODEL)
    seconds = time_alternating({str(n): lambda n=n: layers[n](x) for n in layers}, rounds=10, warm_up=1)
    for n in layers:
        # Fewer tokens for each expert make less of every read of its weights.
        record(f"mixture, {n} experts / 8 experts", seconds[str(n)] / seconds["8"], at_most=2.0)
    benchmark.pedantic(lambda: layers[64](x), rounds=2)


@pytest.mark.parametrize("n_tokens", [1, 16, 256])
@pytest.mark.parametrize(("family", "n_experts", "k"), [("mixtral", 8, 2), ("qwen3_moe", 64, 8)])
@torch.no_grad()
def test_against_transformers(
    family: str, n_experts: int, k: int, n_tokens: int, benchmark: Any, record: Any, one_thread: None
) -> None:
    """The layer alone: a step of decoding, a short prompt, a long one."""
    ours, theirs = _make_ours(n_experts, k), _make_theirs(family, n_experts, k)
    x = torch.randn(1, n_tokens, D_MODEL)
    seconds = time_alternating({"transformers": lambda: theirs(x), "ours": lambda: ours(x)}, rounds=40)
    record(f"mixture as in {family}, {n_tokens} tokens: ours / transformers", seconds["ours"] / seconds["transformers"],
           at_most=1.1)  # fmt: skip
    benchmark.pedantic(lambda: ours(x), rounds=5)
