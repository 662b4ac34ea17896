"""Cohere's Command R (Cohere 2024) and Aya 23 (Aryabumi et al. 2024, "Aya 23: Open Weight Releases").

Checkpoints: CohereLabs/c4ai-command-r-v01, c4ai-command-r-plus, their 08-2024 versions, aya-23-8B and 35B,
aya-expanse-8b and 32b.

Peculiarities:
- Attention and MLP read the stream through one LayerNorm, without bias, whose weight acts in float32.
- Rotary pairs neighbours.
- Logits are multiplied by `logit_scale`, 0.0625 where the config is silent.
- `use_qk_norm` (Command R+): LayerNorms of queries and keys, each head by itself, with a weight for each head.
- The unembedding is tied where the config is silent.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    PositionKeys,
    norm_key,
    qk_norm_flag,
)
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("layer_norm_eps", "layer", default_eps=1e-5, bias=False, wide_weight=True),
        qk_norm_flag("use_qk_norm", per_head=True),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("logit_scale", "logits_scale", float, default=0.0625),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=8192, default_base=5e5, layout="interleaved"),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False, "wiring": "parallel", "shared_norm": True},
    inert=("model_max_length",),
)

FAMILY = Family(
    name="cohere",
    model_types=("cohere",),
    architectures=("CohereForCausalLM", "CohereModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
)
