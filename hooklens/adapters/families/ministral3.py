"""Ministral 3 (Mistral AI 2025, "Introducing Mistral 3") and other text decoders of that `model_type`.

Checkpoints: the decoders of mistralai/Ministral-3-3B-*, 8B and 14B-*-2512 and of Devstral-Small-2, which are published
inside multimodal ones.

Peculiarities:
- Mistral's network, in which queries grow with their position, in every layer and after rotary:
  `1 + beta * ln(1 + floor(position / original))` with `llama_4_scaling_beta` and
  `original_max_position_embeddings` of the object that describes the rotation. A beta of 0 is none.
- Where the config has no such object, rotary is stretched 16 times with YaRN at a base of 1e6; a flat `rope_theta`
  then counts for nothing.
- One sliding window for all layers; none where the config is silent.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, ConfigMap, Key, PositionKeys, WindowKeys, norm_key
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=128, nullable=True),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(
            default_n_ctx=262144,
            default_rope={
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            temperature="llama_4_scaling_beta",
        ),
        WindowKeys(typed=False),
    ),
    fixed={"gated_mlp": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
)

FAMILY = Family(
    name="ministral3",
    model_types=("ministral3",),
    architectures=("Ministral3ForCausalLM", "Ministral3Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
