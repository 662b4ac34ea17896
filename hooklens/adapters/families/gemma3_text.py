"""Gemma 3, text only (Gemma Team 2025, "Gemma 3 Technical Report").

Checkpoints: google/gemma-3-270m, gemma-3-1b-pt and their `-it` versions; the text decoder of the larger ones.

Peculiarities:
- Gemma 2's network and names with norms of queries and keys, and without soft caps: transformers reads that of
  logits, null in every checkpoint, and not that of scores (`attn_logit_softcapping`), which must be null.
- Five layers slide, the sixth sees all, where there are no `layer_types` (`sliding_window_pattern`).
- Two rotations: layers that see all have `rope_theta` (1e6) and `rope_scaling`, those that slide
  `rope_local_base_freq` (1e4) and never a scaling. transformers 5 writes both, by kind, into `rope_parameters`.
- Configs inside of the larger checkpoints are silent of what the 4B has: its vocabulary, heads and head size.
- With `use_bidirectional_attention` (EmbeddingGemma) it is no causal model, and refused.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    QK_NORM,
    ROOT_EMBED_SCALE,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    LayeredRotary,
    PositionKeys,
    WindowKeys,
    all_but_every,
    norm_key,
    score_scalar_key,
)
from hooklens.adapters.tables import SANDWICH_NORMS, llama_rules

_PERIOD = "sliding_window_pattern"

_CONFIG = ConfigMap(
    parts=(
        Key("vocab_size", "d_vocab", int, default=262208),
        Key("hidden_size", "d_model", int),
        Key("num_hidden_layers", "n_layers", int),
        Key("num_attention_heads", "n_heads", int, default=8),
        Key("num_key_value_heads", "n_kv_heads", int, default=4),
        Key("head_dim", "d_head", int, default=256),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_activation", default="gelu_pytorch_tanh"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6, unit_offset=True, wide_weight=True),
        QK_NORM,
        score_scalar_key("query_pre_attn_scalar", default=256),
        Key("final_logit_softcapping", "logits_softcap", float, default=None, nullable=True),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        LayeredRotary(
            windows=WindowKeys(default=4096, slides=all_but_every(6, _PERIOD), slides_keys=(_PERIOD,), nullable=False),
            rotary=PositionKeys(default_n_ctx=131072, default_base=1e6),
            local_base=("rope_local_base_freq", 1e4),
        ),
        ROOT_EMBED_SCALE,
    ),
    fixed={"gated_mlp": True, "mlp_bias": False, "norm_after": True},
    pinned={"attn_logit_softcapping": None, "use_bidirectional_attention": False},
    inert=("cache_implementation", "hidden_act"),
)

FAMILY = Family(
    name="gemma3_text",
    model_types=("gemma3_text",),
    architectures=("Gemma3ForCausalLM", "Gemma3TextModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(norms=SANDWICH_NORMS),
)
