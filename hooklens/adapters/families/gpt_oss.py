"""gpt-oss (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card").

Checkpoints: openai/gpt-oss-20b and gpt-oss-120b, whose experts are MXFP4 and are dequantised, and fine-tunes and
dequantised copies of them in plain dtypes, whose `model_type` is `gpt_oss`.

Peculiarities:
- Every head has a sink, a learned logit that takes part in the softmax and has no value (`self_attn.sinks`).
- Every second layer has a sliding window, the first among them, where the config names no `layer_types`.
- The experts' SwiGLU is clamped (`swiglu_limit`, `swiglu_alpha`), and `hidden_act` says nothing. Router and experts
  have biases, attention has them where `attention_bias` says so, which it does where it is silent.
- The gates are the softmax over the chosen experts' logits.
- Experts are stacked, as `[in, out]`, and the columns of gate and linear half alternate: g0, l0, g1, l1, ...
- Without `rope_parameters` it is YaRN with factor 32 over 4096 tokens, its bounds not rounded, and a base of 150000. A
  published `rope_scaling` leaves the base to `rope_theta`.
- Norm weights are multiplied in float32, before the cast to the weights' dtype. transformers computes the softmaxes of
  router and attention in the dtype of the weights, and attends with `eager` only.
- `initial_context_length`, `experts_per_token` and the like in older files are notes of the original format.
"""

from collections.abc import Sequence

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    SIZE_KEYS,
    BiasFlag,
    ConfigMap,
    ConfigReader,
    Key,
    MixtureKeys,
    PositionKeys,
    WindowKeys,
    norm_key,
)
from hooklens.adapters.rules import Copy, Fused
from hooklens.adapters.tables import BLOCK, Rules, attention_rules, llama_rules, router_rules


def _slides(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
    return [layer % 2 == 0 for layer in range(n_layers)]


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=64),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5, wide_weight=True),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(
            default_n_ctx=131072,
            default_base=150000.0,
            default_rope={
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        ),
        WindowKeys(default=128, slides=_slides, nullable=False),
        MixtureKeys(
            options=(
                Key("num_local_experts", "n_experts", int, alias="num_experts"),
                Key("num_experts_per_tok", "experts_per_token", int),
                Key("intermediate_size", "d_expert", int),
                Key("swiglu_limit", "swiglu_limit", float, default=7.0),
                Key("swiglu_alpha", "swiglu_alpha", float, default=1.702),
            ),
            fixed={"gate_norm": 1.0, "router_bias": True, "expert_bias": True, "act_fn": "clamped_swiglu"},
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False, "act_fn": "silu", "attn_sinks": True},
    pinned={"hidden_act": "silu"},
    inert=(*INERT_ROUTER_KEYS, "experts_per_token", "initial_context_length"),
)

_LAYER = "model.layers.{i}"
_EXPERTS, _OURS = f"{_LAYER}.mlp.experts", f"{BLOCK}.mlp"

_MIXTURE: Rules = (
    *router_rules(f"{_LAYER}.mlp.router"),
    Fused(f"{_EXPERTS}.gate_up_proj", (f"{_OURS}.W_gate", f"{_OURS}.W_in"), "e m (f s) -> s e m f", part="moe"),
    Fused(f"{_EXPERTS}.gate_up_proj_bias", (f"{_OURS}.b_gate", f"{_OURS}.b_in"), "e (f s) -> s e f", part="moe"),
    Copy(f"{_EXPERTS}.down_proj", f"{_OURS}.W_out", part="moe"),
    Copy(f"{_EXPERTS}.down_proj_bias", f"{_OURS}.b_out", part="moe"),
)

FAMILY = Family(
    name="gpt_oss",
    model_types=("gpt_oss",),
    architectures=("GptOssForCausalLM", "GptOssModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        attention=(
            *attention_rules(f"{_LAYER}.self_attn"),
            Copy(f"{_LAYER}.self_attn.sinks", f"{BLOCK}.attn.sinks"),
        ),
        mlp=_MIXTURE,
    ),
    turned_experts=True,
)
