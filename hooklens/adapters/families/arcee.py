"""Arcee Foundation Models (Atkins et al. 2025, "AFM-4.5B").

Checkpoints: arcee-ai/AFM-4.5B, AFM-4.5B-Base, AFM-4.5B-Base-Pre-Anneal, AFM-4.5B-Preview.

Peculiarities:
- Llama's network and names, but the MLP is plain, with squared ReLU: `up_proj` and `down_proj`.
- `attention_bias` covers all four maps of attention, `mlp_bias` both of the MLP.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import llama_rules, mlp_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="relu2"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("mlp_bias", "mlp_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=4096),
    ),
    fixed={"gated_mlp": False},
)

FAMILY = Family(
    name="arcee",
    model_types=("arcee",),
    architectures=("ArceeForCausalLM", "ArceeModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(mlp=mlp_rules("model.layers.{i}.mlp", up="up_proj", down="down_proj")),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
