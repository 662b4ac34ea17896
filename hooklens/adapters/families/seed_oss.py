"""Seed-OSS (ByteDance Seed Team 2025, "Seed-OSS Open-Source Models").

Checkpoints: ByteDance-Seed/Seed-OSS-36B-Base, Seed-OSS-36B-Base-woSyn, Seed-OSS-36B-Instruct.

Peculiarities:
- Llama's network and names; `attention_bias`, on where the config is silent, gives queries, keys and values biases,
  and `attention_out_bias`, off where it is silent, the output.
- `head_dim` is 128 where the config is silent, whatever `hidden_size` is (36B: 80 heads of 128 beside a width of 5120).
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=128, nullable=True),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        Key("attention_bias", "qkv_bias", bool, default=True),
        Key("attention_out_bias", "out_bias", bool, default=False),
        Key("mlp_bias", "mlp_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=524288),
    ),
    fixed={"gated_mlp": True},
)

FAMILY = Family(
    name="seed_oss",
    model_types=("seed_oss",),
    architectures=("SeedOssForCausalLM", "SeedOssModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
