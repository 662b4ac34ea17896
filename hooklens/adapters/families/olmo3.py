"""Olmo 3 (Olmo Team 2025, "Olmo 3").

Checkpoints: allenai/Olmo-3-1025-7B, Olmo-3-1125-32B, their Think, Instruct and RL-Zero versions, Olmo-3.1-32B-*.

Peculiarities:
- OLMo 2's network and names with windows: three layers slide, the fourth sees all, where there are no `layer_types`.
- `rope_theta` and `rope_scaling` (YaRN, for the long context) are those of layers that see all. Layers that slide
  turn plainly with base 500000, whatever `rope_theta` says; only `rope_parameters` by kind changes that.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    QK_NORM,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Key,
    LayeredRotary,
    PositionKeys,
    WindowKeys,
    all_but_every,
    norm_key,
)
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
        LayeredRotary(
            windows=WindowKeys(default=4096, nullable=False, slides=all_but_every(4)),
            rotary=PositionKeys(default_base=5e5),
            local_base=(None, 5e5),
        ),
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
    name="olmo3",
    model_types=("olmo3",),
    architectures=("Olmo3ForCausalLM", "Olmo3Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        norms=POST_NORMS,
        attention=(*attention_rules(_ATTENTION), *qk_norm_rules(_ATTENTION, heads_flat=True)),
    ),
)
