"""GLM-4 (GLM Team 2024, "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools") and GLM-Edge.

Checkpoints: zai-org/glm-4-9b-hf, glm-4-9b-chat-hf, glm-4-9b-chat-1m-hf, glm-edge-1.5b-chat, glm-edge-4b-chat. The
checkpoints without `-hf` come with code of their own and are of another `model_type`.

Peculiarities:
- `attention_bias`, on where the config is silent, gives queries, keys and values biases, and never the output.
- Rotary pairs neighbours (interleaved) in the first half of each head where the config is silent.
- The MLP's gate and linear half lie in one tensor.
- `head_dim` is 128 where the config is silent, whatever `hidden_size` is.
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
    fixed={"gated_mlp": True, "out_bias": False, "mlp_bias": False},
)

FAMILY = Family(
    name="glm",
    model_types=("glm",),
    architectures=("GlmForCausalLM", "GlmModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(mlp=fused_gate_rules("model.layers.{i}.mlp")),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
