"""Granite 3 and 4.1 (IBM Research; Granite Team 2024, "Granite 3.0 Language Models").

Checkpoints: ibm-granite/granite-3.0-2b-base and 8b, 3.1, 3.2 and 3.3 of these, PowerLM-3b, granite-4.1-*; Granite Code
is Llama or GPT-BigCode.

Peculiarities:
- Llama's network and names with four factors: on the embedding (`embedding_multiplier`), on what each branch adds to
  the stream (`residual_multiplier`), and on scores (`attention_multiplier`, in place of the inverse root of the head
  size: 1 where the config is silent); logits are divided by `logits_scaling`.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    MULTIPLIER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    PositionKeys,
    norm_key,
)
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        *MULTIPLIER_KEYS,
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("mlp_bias", "mlp_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(),
    ),
    fixed={"gated_mlp": True},
)

FAMILY = Family(
    name="granite",
    model_types=("granite",),
    architectures=("GraniteForCausalLM", "GraniteModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
)
