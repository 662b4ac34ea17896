"""An independent forward over HookLens state dicts, written with plain einsums, and configs and steps to try it on.

Weight processing must leave its log-probabilities as they are. Nothing here comes from `hooklens.model`.
"""

from typing import Any

import torch
from torch import Tensor

from hooklens.config import (
    AlibiPositions,
    HookedConfig,
    LearnedPositions,
    NoPositions,
    NormConfig,
    PartConfig,
    RotaryPositions,
)
from hooklens.weights.shapes import weight_shapes

RMS_NORM, LAYER_NORM = NormConfig(kind="rms", eps=1e-6, bias=False), NormConfig(kind="layer", eps=1e-5)
ATTENTION, MLP = PartConfig(kind="attention"), PartConfig(kind="mlp")

STEPS = (
    "fold_ln",
    "center_writing_weights",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)


def make_config(**changes) -> HookedConfig:
    sizes = {"d_model": 12, "n_layers": 2, "n_heads": 4, "d_head": 5, "d_mlp": 14, "d_vocab": 17, "n_ctx": 9}
    sizes["positions"] = NoPositions()
    return HookedConfig(**{**sizes, **changes})


CONFIGS = {
    "sequential, tied, learned": make_config(positions=LearnedPositions(offset=2), tied_unembed=True),
    "sequential, alibi": make_config(positions=AlibiPositions(scaled=True), unembed_bias=True),
    "sequential, no biases in the maps": make_config(qkv_bias=False, out_bias=False, mlp_bias=False),
    "parallel, two norms, grouped": make_config(
        wiring="parallel", n_kv_heads=2, positions=RotaryPositions(dim=2), out_bias=False
    ),
    "parallel, shared norm, multi-query, tied": make_config(
        wiring="parallel", shared_norm=True, n_kv_heads=1, positions=RotaryPositions(dim=4),
        qkv_bias=False, out_bias=False, mlp_bias=False, tied_unembed=True,
    ),
    "layer norm without bias, unit offset": make_config(
        norm=NormConfig(kind="layer", eps=1e-5, bias=False, unit_offset=True), qkv_bias=False
    ),
    "rms, gated, grouped": make_config(
        norm=RMS_NORM, gated_mlp=True, act_fn="silu", n_kv_heads=2, positions=RotaryPositions(dim=4),
        qkv_bias=True, out_bias=False, mlp_bias=False,
    ),
    "rms, unit offset, norms after, caps, tied": make_config(
        norm=NormConfig(kind="rms", eps=1e-6, bias=False, unit_offset=True), gated_mlp=True, norm_after=True,
        attn_softcap=5.0, logits_softcap=3.0, embed_scale=3.5, qkv_bias=False, mlp_bias=False, tied_unembed=True,
        windows=(3, None), qk_norm=RMS_NORM,
    ),
    "norms after only": make_config(norm_before=False, norm_after=True),
    "no norm in the blocks": make_config(norm_before=False),
    "gated with biases": make_config(gated_mlp=True, n_kv_heads=2, attn_scale=0.3),
    "attention only, layer norm without weight": make_config(
        attn_only=True, norm=NormConfig(kind="layer", eps=1e-5, weight=False, bias=False), unembed_bias=True
    ),
    "no norms": make_config(norm=None, tied_unembed=True),
    "no final norm": make_config(final_norm=None),
    "layers that lack parts": make_config(
        n_layers=4, attn=(None, ATTENTION, None, ATTENTION), mlp=(MLP, None, None, MLP),
        norm=(LAYER_NORM, None, LAYER_NORM, NormConfig(kind="layer", eps=1e-5, weight=False)), final_norm=LAYER_NORM,
        mlp_bias=False, qkv_bias=False,
    ),
    "layers with other norms": make_config(
        norm=(RMS_NORM, LAYER_NORM), final_norm=NormConfig(kind="rms", eps=1e-6, weight=False, bias=False),
        norm_after=(False, True), norm_before=(True, False), qk_norm=(None, RMS_NORM), tied_unembed=True,
    ),
    "MLPs alone": make_config(attn=None, wiring="parallel", shared_norm=True, mlp_bias=False),
}  # fmt: skip


def random_state(cfg: HookedConfig, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Every parameter random, norm weights and biases too; a tied unembedding shares storage."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: (0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in weight_shapes(cfg).items()
    }
    if cfg.tied_unembed:
        state["unembed.W_U"] = state["embed.W_E"].T
    return state


def random_tokens(cfg: HookedConfig, *, seed: int = 1) -> Tensor:
    return torch.randint(cfg.d_vocab, (3, 7), generator=torch.Generator().manual_seed(seed))


def log_probs(state: dict[str, Tensor], cfg: HookedConfig, tokens: Tensor) -> Tensor:
    return run_reference(state, cfg, tokens).log_softmax(-1)


def run_reference(state: dict[str, Tensor], cfg: HookedConfig, tokens: Tensor) -> Tensor:
    """Logits `[batch, pos, d_vocab]`."""
    x = state["embed.W_E"][tokens] * (cfg.embed_scale or 1.0)
    if isinstance(cfg.positions, LearnedPositions):
        x = x + state["pos_embed.W_pos"][cfg.positions.offset :][: tokens.shape[1]]
    for layer in range(cfg.n_layers):
        block = {k.removeprefix(f"blocks.{layer}."): v for k, v in state.items() if k.startswith(f"blocks.{layer}.")}
        norm, attends = of_layer(cfg.norm, layer), of_layer(cfg.attn, layer) is not None
        before, after = (norm if of_layer(flag, layer) else None for flag in (cfg.norm_before, cfg.norm_after))
        attn_out = mlp_out = torch.zeros_like(x)
        attn_in = _norm(block, "ln1", x, before) if attends or cfg.shared_norm else x
        if attends:
            attn_out = _norm(block, "ln1_post", _attention(block, cfg, attn_in, layer), after)
        if of_layer(cfg.mlp, layer) is not None:
            mid = x if cfg.wiring == "parallel" else x + attn_out
            mlp_in = attn_in if cfg.shared_norm else _norm(block, "ln2", mid, before)
            mlp_out = _norm(block, "ln2_post", _mlp(block, cfg, mlp_in), after)
        x = x + attn_out + mlp_out
    logits = _norm(state, "ln_final", x, cfg.final_norm) @ state["unembed.W_U"] + state.get("unembed.b_U", 0.0)
    return _softcap(logits, cfg.logits_softcap)


def of_layer(value: Any, layer: int) -> Any:
    """What a field of a configuration says of a layer."""
    return value[layer] if isinstance(value, tuple) else value


def _norm(weights: dict[str, Tensor], name: str, x: Tensor, norm: NormConfig | None) -> Tensor:
    if norm is None:
        return x
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
    w = weights[f"{name}.w"] if norm.weight else torch.ones((), dtype=x.dtype)
    return x * (1 + w if norm.unit_offset else w) + (weights[f"{name}.b"] if norm.bias else 0.0)


def _softcap(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _attention(block: dict[str, Tensor], cfg: HookedConfig, x: Tensor, layer: int) -> Tensor:
    q, k, v = (
        torch.einsum("bpd,ndh->bpnh", x, block[f"attn.W_{part}"]) + block.get(f"attn.b_{part}", 0.0) for part in "QKV"
    )
    q, k = (_norm(block, f"attn.{name}_norm", x, of_layer(cfg.qk_norm, layer)) for name, x in (("q", q), ("k", k)))
    if isinstance(cfg.positions, RotaryPositions):
        q, k = _rotate(q, cfg.positions), _rotate(k, cfg.positions)
    group = cfg.n_heads // cfg.n_kv_heads
    k, v = k.repeat_interleave(group, dim=2), v.repeat_interleave(group, dim=2)
    scores = _softcap(torch.einsum("bqnh,bknh->bnqk", q, k) * cfg.score_scale, cfg.attn_softcap)
    query, key = torch.arange(x.shape[1])[:, None], torch.arange(x.shape[1])[None, :]
    if isinstance(cfg.positions, AlibiPositions):
        slopes = 2.0 ** (-8.0 * torch.arange(1, cfg.n_heads + 1, dtype=x.dtype) / cfg.n_heads)
        scores = scores + slopes[:, None, None] * key * cfg.score_scale
    allowed = key <= query
    if (window := cfg.window(layer)) is not None:
        allowed = allowed & (key > query - window)
    pattern = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    z = torch.einsum("bnqk,bknh->bqnh", pattern, v)
    return torch.einsum("bqnh,nhd->bqd", z, block["attn.W_O"]) + block.get("attn.b_O", 0.0)


def _rotate(x: Tensor, rotary: RotaryPositions) -> Tensor:
    half = rotary.dim // 2
    angles = torch.arange(x.shape[1])[:, None] * rotary.base ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    a, b, rest = x[..., :half], x[..., half : rotary.dim], x[..., rotary.dim :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def _mlp(block: dict[str, Tensor], cfg: HookedConfig, x: Tensor) -> Tensor:
    act = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}[cfg.act_fn]
    pre = x @ block["mlp.W_in"] + block.get("mlp.b_in", 0.0)
    post = act(x @ block["mlp.W_gate"] + block.get("mlp.b_gate", 0.0)) * pre if cfg.gated_mlp else act(pre)
    return post @ block["mlp.W_out"] + block.get("mlp.b_out", 0.0)
