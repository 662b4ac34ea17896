"""Gemma 2 (Gemma Team 2024b, "Gemma 2: Improving Open Language Models at a Practical Size").

Checkpoints: google/gemma-2-2b, gemma-2-9b, gemma-2-27b and their `-it` versions, ShieldGemma, Gemma Scope's models.

Peculiarities:
- Norms before and after each branch. `post_attention_layernorm` is the one after attention, not, as in Llama, the one
  before the MLP; that is `pre_feedforward_layernorm`.
- Norm weights are stored as their difference from 1, and act in float32.
- Layers 0, 2, 4, ... slide, the others see all, where there are no `layer_types`.
- Scores are multiplied by the inverse root of `query_pre_attn_scalar`, which need not be the head size (27B: 144).
- Scores and logits have soft caps, 50 and 30 where the config is silent; null is none.
- The token embedding is multiplied by the root of `hidden_size`. `hidden_act` is not read.
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
    WindowKeys,
    all_but_every,
    norm_key,
    score_scalar_key,
)
from hooklens.adapters.tables import SANDWICH_NORMS, llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=256),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_activation", default="gelu_pytorch_tanh"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6, unit_offset=True, wide_weight=True),
        score_scalar_key("query_pre_attn_scalar", default=256),
        Key("attn_logit_softcapping", "attn_softcap", float, default=50.0, nullable=True),
        Key("final_logit_softcapping", "logits_softcap", float, default=30.0, nullable=True),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=8192),
        WindowKeys(default=4096, nullable=False, slides=all_but_every(2)),
        ROOT_EMBED_SCALE,
    ),
    fixed={"gated_mlp": True, "mlp_bias": False, "norm_after": True},
    pinned={"use_bidirectional_attention": False},
    inert=("cache_implementation", "hidden_act", "num_image_tokens", "sliding_window_size"),
)

FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    architectures=("Gemma2ForCausalLM", "Gemma2Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(norms=SANDWICH_NORMS),
)
