"""Qwen3 with a mixture of experts (Yang et al. 2025, "Qwen3 Technical Report").

Checkpoints: Qwen/Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder-30B-A3B-Instruct, and every other one whose `model_type`
is `qwen3_moe`.

Peculiarities:
- Qwen3's attention (an RMSNorm of each head's query and key, `attention_bias` on all four maps), but a head is
  `hidden_size / num_attention_heads` wide where the config has no `head_dim` (Qwen3: 128).
- The gates of the chosen experts sum to one where `norm_topk_prob` says so; published configs do, silence means no.
- Layers in `mlp_only_layers`, and those that `decoder_sparse_step` skips, have an MLP as wide as `intermediate_size`;
  experts are as wide as `moe_intermediate_size`.
- One sliding window for all layers, where `use_sliding_window` is on; `max_window_layers` says nothing.
- The number of experts is `num_experts` in published files, `num_local_experts` in those that transformers 5 writes.
- transformers 5 holds experts stacked in memory.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    QK_NORM,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    PositionKeys,
    WindowKeys,
    norm_key,
    stepped_mixture_keys,
)
from hooklens.adapters.tables import (
    expert_rules,
    gated_mlp_rules,
    llama_rules,
    router_rules,
    stacked_expert_rules,
)

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        QK_NORM,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=32768),
        WindowKeys(default=4096, switch="use_sliding_window", typed=False),
        stepped_mixture_keys(),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
    # Qwen3-Coder's configs have these of other architectures; transformers ignores them.
    pinned={"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True},
    inert=(*INERT_ROUTER_KEYS, "max_window_layers"),
)

_MLP = "model.layers.{i}.mlp"

FAMILY = Family(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    architectures=("Qwen3MoeForCausalLM", "Qwen3MoeModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        mlp=(*gated_mlp_rules(_MLP), *router_rules(f"{_MLP}.gate"), *expert_rules(f"{_MLP}.experts.{{e}}"))
    ),
    in_memory=stacked_expert_rules(f"{_MLP}.experts"),
)
