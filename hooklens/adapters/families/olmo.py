"""OLMo (Groeneveld et al. 2024, "OLMo: Accelerating the Science of Language Models").

Checkpoints: allenai/OLMo-1B-hf, OLMo-7B-hf, OLMo-7B-0424-hf, OLMo-7B-0724-hf and others in transformers' format; those
without `-hf` have `model_type` `hf_olmo` and names of their own.

Peculiarities:
- LayerNorms without weight and bias, eps 1e-5: files hold no tensor of a norm, configs no key of one.
- `clip_qkv` (8 in the 7B of 0424 and 0724) holds queries, keys and values before rotary.
- The 1B ties the unembedding.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys
from hooklens.adapters.tables import llama_rules
from hooklens.config import NormConfig

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("clip_qkv", "clip_qkv", float, default=None, nullable=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(),
    ),
    fixed={
        "gated_mlp": True,
        "mlp_bias": False,
        "norm": NormConfig(kind="layer", eps=1e-5, weight=False, bias=False),
    },
)

FAMILY = Family(
    name="olmo",
    model_types=("olmo",),
    architectures=("OlmoForCausalLM", "OlmoModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
)
