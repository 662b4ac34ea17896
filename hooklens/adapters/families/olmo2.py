"""OLMo 2 (OLMo Team 2024, "2 OLMo 2 Furious").

Checkpoints: allenai/OLMo-2-0425-1B, OLMo-2-1124-7B, OLMo-2-1124-13B, OLMo-2-0325-32B, their instruct versions.

Peculiarities:
- RMSNorms after each branch and none before; weights act in float32.
- Queries and keys are normed over all heads together, with a weight for each entry.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import QK_NORM, SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import POST_NORMS, attention_rules, llama_rules, qk_norm_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5, wide_weight=True),
        QK_NORM,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(),
    ),
    fixed={
        "gated_mlp": True,
        "mlp_bias": False,
        "norm_before": False,
        "norm_after": True,
        "qk_norm_over": "all_heads",
    },
)

_ATTENTION = "model.layers.{i}.self_attn"

FAMILY = Family(
    name="olmo2",
    model_types=("olmo2",),
    architectures=("Olmo2ForCausalLM", "Olmo2Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        norms=POST_NORMS,
        attention=(*attention_rules(_ATTENTION), *qk_norm_rules(_ATTENTION, heads_flat=True)),
    ),
)
