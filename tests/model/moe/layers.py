"""Mixtures of experts with every parameter random, and what they compute, token by token in plain Python."""

import math

import torch
from torch import Tensor

from hooklens import HookedCausalLM, MoEConfig
from hooklens.model import MoE
from tests.model.networks import make_config, make_model

D_MODEL = 12
SIZES = {"n_experts": 6, "experts_per_token": 2, "d_expert": 5}

# One for each form of router and expert that decoders have.
MIXTURES = {
    "softmax": MoEConfig(**SIZES),
    "renormalised": MoEConfig(**SIZES, gate_norm=1.0),
    "p-norm": MoEConfig(**{**SIZES, "experts_per_token": 3}, gate_norm=2.0, gate_scale=1.5),
    "groups": MoEConfig(**SIZES, n_groups=3, groups_per_token=2, gate_scale=4.0, d_shared=7),
    "sigmoid with correction": MoEConfig(
        **{**SIZES, "experts_per_token": 3}, router="sigmoid", choice_bias=True, gate_norm=1.0, gate_scale=2.5,
        n_groups=3, groups_per_token=2, group_top=2, d_shared=10,
    ),
    "sigmoid on the input": MoEConfig(**SIZES, router="sigmoid_input", d_shared=5),
    "sparsemixer": MoEConfig(**SIZES, router="sparsemixer", sparsemixer_eps=0.3),
    "clamped, biased": MoEConfig(
        **SIZES, gate_norm=1.0, router_bias=True, expert_bias=True, act_fn="clamped_swiglu", swiglu_limit=1.5,
    ),
    "gated shared expert": MoEConfig(**SIZES, d_shared=7, shared_gate=True, router_bias=True, expert_bias=True),
    "one expert": MoEConfig(n_experts=4, experts_per_token=1, d_expert=5, router_float32=True),
    "all experts": MoEConfig(n_experts=3, experts_per_token=3, d_expert=4, gate_norm=1.0),
}  # fmt: skip


def make_layer(mixture: MoEConfig, *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes) -> MoE:
    """A layer by itself."""
    layer = MoE(_block(mixture, **changes)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return layer


def make_mixed_model(mixture: MoEConfig, *, dtype: torch.dtype = torch.float64, **changes) -> HookedCausalLM:
    """Two layers with that mixture at the MLP's place."""
    return make_model(make_config(**{"act_fn": "silu", "mlp": mixture, **changes}), dtype=dtype)


def _block(mixture: MoEConfig, **changes):
    block = make_config(**{"act_fn": "silu", "mlp": mixture, **changes}).block(0)
    return block.of(block.mlp)


def random_stream(batch: int = 2, n: int = 5, *, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, n, D_MODEL, generator=generator, dtype=torch.float64).to(dtype)


def compute_by_hand(layer: MoE, mixture: MoEConfig, x: Tensor, act_fn: str = "silu") -> Tensor:
    """The layer's output, one token after another, each expert asked by itself."""
    weights = {name: parameter.detach().double() for name, parameter in layer.named_parameters()}
    rows = []
    for row in x.double():
        rows.append(torch.stack([_run_token(weights, mixture, token, act_fn) for token in row]))
    return torch.stack(rows)


def _run_token(weights: dict[str, Tensor], mixture: MoEConfig, token: Tensor, act_fn: str) -> Tensor:
    logits = weights["router_proj.weight"] @ token
    if mixture.router_bias:
        logits = logits + weights["router_proj.bias"]
    chosen = choose_by_hand(logits.tolist(), mixture, weights.get("b_choice", torch.zeros(len(logits))).tolist())
    gates = weigh_by_hand(logits.tolist(), chosen, mixture)
    out = torch.zeros_like(token)
    for expert, gate in zip(chosen, gates, strict=True):
        own = {f"{kind}_{name}": weights[f"{name}_maps.{held}"][expert].t() for name in ("gate", "in", "out")
               for kind, held in (("W", "weight"), ("b", "bias")) if f"{name}_maps.{held}" in weights}  # fmt: skip
        is_inside = mixture.router == "sigmoid_input"
        made = _run_expert(own, mixture, token * gate if is_inside else token, act_fn)
        out = out + (made if is_inside else gate * made)
    if mixture.d_shared is not None:
        own = {f"{kind}_{name}": weights[f"shared.{module}.{held}"].t()
               for name, module in (("gate", "gate_proj"), ("in", "in_proj"), ("out", "out_proj"))
               for kind, held in (("W", "weight"), ("b", "bias")) if f"shared.{module}.{held}" in weights}  # fmt: skip
        made = _run_expert(own, mixture, token, act_fn)
        if mixture.shared_gate:
            at = weights["shared.shared_gate_proj.weight"][0] @ token
            at = at + weights["shared.shared_gate_proj.bias"][0] if mixture.router_bias else at
            made = made / (1 + math.exp(-float(at)))
        out = out + made
    return out


def choose_by_hand(logits: list[float], mixture: MoEConfig, added: list[float]) -> list[int]:
    scores = [score + more for score, more in zip(_scores(logits, mixture), added, strict=True)]
    allowed = set(range(len(scores)))
    if mixture.n_groups is not None:
        size = len(scores) // mixture.n_groups
        groups = [range(start, start + size) for start in range(0, len(scores), size)]
        worth = [sum(sorted((scores[e] for e in group), reverse=True)[: mixture.group_top]) for group in groups]
        best = sorted(range(len(groups)), key=lambda g: -worth[g])[: mixture.groups_per_token]
        allowed = {e for g in best for e in groups[g]}
    return sorted(allowed, key=lambda e: -scores[e])[: mixture.experts_per_token]


def weigh_by_hand(logits: list[float], chosen: list[int], mixture: MoEConfig) -> list[float]:
    if mixture.router == "sparsemixer":
        gates = _mix_by_hand(logits, chosen, 0.01 if mixture.sparsemixer_eps is None else mixture.sparsemixer_eps)
    else:
        gates = [_scores(logits, mixture)[e] for e in chosen]
    if mixture.gate_norm is not None:
        norm = sum(gate**mixture.gate_norm for gate in gates) ** (1 / mixture.gate_norm)
        gates = [gate / norm for gate in gates]
    return [gate * (mixture.gate_scale or 1.0) for gate in gates]


def _scores(logits: list[float], mixture: MoEConfig) -> list[float]:
    if mixture.router == "softmax":
        total = sum(math.exp(one) for one in logits)
        return [math.exp(one) / total for one in logits]
    return [1 / (1 + math.exp(-one)) for one in logits]


def _mix_by_hand(logits: list[float], chosen: list[int], eps: float) -> list[float]:
    gates, left = [], set(range(len(logits)))
    for expert in chosen:
        best = max(logits[e] for e in left)
        near = [e for e in left if (best - logits[e]) / max(abs(logits[e]), best) <= 2 * eps]
        gates.append(math.exp(logits[expert]) / sum(math.exp(logits[e]) for e in near) if expert in near else 0.0)
        left.remove(expert)
    return gates


def _run_expert(own: dict[str, Tensor], mixture: MoEConfig, token: Tensor, act_fn: str) -> Tensor:
    gate, linear = (token @ own[f"W_{half}"] + own.get(f"b_{half}", 0.0) for half in ("gate", "in"))
    name = mixture.act_fn or act_fn
    if name == "clamped_swiglu":
        limit, alpha = mixture.swiglu_limit or 7.0, mixture.swiglu_alpha or 1.702
        neurons = [
            min(g, limit) / (1 + math.exp(-alpha * min(g, limit))) * (max(-limit, min(limit, up)) + 1)
            for g, up in zip(gate.tolist(), linear.tolist(), strict=True)
        ]
    else:
        acts = {"silu": lambda g: g / (1 + math.exp(-g)), "relu": lambda g: max(g, 0.0),
                "gelu": lambda g: g * (1 + math.erf(g / 2**0.5)) / 2}  # fmt: skip
        neurons = [acts[name](g) * up for g, up in zip(gate.tolist(), linear.tolist(), strict=True)]
    return torch.tensor(neurons, dtype=token.dtype) @ own["W_out"] + own.get("b_out", 0.0)
