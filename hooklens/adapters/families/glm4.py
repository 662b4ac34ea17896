"""GLM-4-0414 (GLM Team 2025, GLM-4-32B-0414 and GLM-Z1).

Checkpoints: zai-org/GLM-4-9B-0414, GLM-4-32B-0414, GLM-Z1-9B-0414, GLM-Z1-32B-0414.

Peculiarities:
- GLM's network with a norm behind each branch, too. `post_attention_layernorm` is the one *before* the MLP, as in
  Llama; those behind the branches are `post_self_attn_layernorm` and `post_mlp_layernorm`.
- `attention_bias`, on where the config is silent, gives queries, keys and values biases, and never the output.
- Rotary pairs neighbours (interleaved) in the first half of each head where the config is silent.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import fused_gate_rules, llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=128, nullable=True),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1.5625e-07),
        Key("attention_bias", "qkv_bias", bool, default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(
            default_n_ctx=131072, fraction="partial_rotary_factor", default_fraction=0.5, layout="interleaved"
        ),
    ),
    fixed={"gated_mlp": True, "norm_after": True, "out_bias": False, "mlp_bias": False},
)

_NORMS = {
    "ln1": "input_layernorm",
    "ln1_post": "post_self_attn_layernorm",
    "ln2": "post_attention_layernorm",
    "ln2_post": "post_mlp_layernorm",
}

FAMILY = Family(
    name="glm4",
    model_types=("glm4",),
    architectures=("Glm4ForCausalLM", "Glm4Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(norms=_NORMS, mlp=fused_gate_rules("model.layers.{i}.mlp")),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
