"""Gemma (Gemma Team 2024a, "Gemma: Open Models Based on Gemini Research and Technology").

Checkpoints: google/gemma-2b and gemma-7b, their `-it` and 1.1 versions, CodeGemma, and fine-tunes of them.

Peculiarities:
- Norm weights are stored as their difference from 1, and act in float32.
- The token embedding is multiplied by the root of `hidden_size`; the unembedding, tied to it, is not.
- Heads are wider than `hidden_size / num_attention_heads`: 256 where the config is silent.
- The first releases write `hidden_act: gelu` and mean its tanh approximation. `hidden_activation`, which they write
  besides, is what transformers 4 went by and transformers 5 does not read.
- The 2B has one key-value head.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    ROOT_EMBED_SCALE,
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
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=256),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="gelu_pytorch_tanh", meaning={"gelu": "gelu_tanh"}),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6, unit_offset=True, wide_weight=True),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=8192),
        ROOT_EMBED_SCALE,
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
    pinned={"hidden_activation": "gelu_pytorch_tanh", "use_bidirectional_attention": False},
    inert=("num_image_tokens",),
)

FAMILY = Family(
    name="gemma",
    model_types=("gemma",),
    architectures=("GemmaForCausalLM", "GemmaModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
)
