"""Qwen2 (Yang et al. 2024, "Qwen2 Technical Report") and Qwen2.5 (Qwen Team 2024, "Qwen2.5 Technical Report").

Checkpoints: Qwen/Qwen1.5-*, Qwen2-*, Qwen2.5-*, Qwen2.5-Coder-*, Qwen2.5-Math-*, QwQ-32B,
deepseek-ai/DeepSeek-R1-Distill-Qwen-* and every other checkpoint whose `model_type` is `qwen2`.

Peculiarities:
- Llama's network and names, with biases on queries, keys and values, always, and never on the output.
- `sliding_window` counts for nothing unless `use_sliding_window` is on, and then only from layer `max_window_layers`
  on (28 where the config is silent), or where `layer_types` says so. No published model switches it on.
- The small models (0.5B to 3B, where so configured) tie the unembedding.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
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
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
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
    fixed={"gated_mlp": True, "qkv_bias": True, "out_bias": False, "mlp_bias": False},
    pinned={"use_mrope": False},
)

FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM", "Qwen2Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
