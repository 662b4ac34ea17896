"""Qwen3 (Qwen Team 2025, "Qwen3 Technical Report"), the dense models.

Checkpoints: Qwen/Qwen3-0.6B to 32B, their -Base, and every other checkpoint whose `model_type` is `qwen3`.

Peculiarities:
- Llama's network and names, without biases (`attention_bias` would give all four maps one), and with an RMSNorm over
  each head's query and key before rotary, one weight for all heads.
- `head_dim` is a size of its own, and 128 where the config is silent, whatever `hidden_size` is.
- Windows as in Qwen2: off unless `use_sliding_window` is on.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    QK_NORM,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    PositionKeys,
    WindowKeys,
    late_layers,
    norm_key,
)
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=128, nullable=True),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        QK_NORM,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=32768),
        WindowKeys(
            default=4096,
            switch="use_sliding_window",
            slides=late_layers("max_window_layers", 28),
            slides_keys=("max_window_layers",),
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
)

FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM", "Qwen3Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
