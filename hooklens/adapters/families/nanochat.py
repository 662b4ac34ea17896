"""nanochat (Karpathy 2025), in transformers' format.

Checkpoints: karpathy/nanochat-d32, nanochat-students/nanochat-d20 and others. The project's own `.pt` files have other
names.

Peculiarities:
- No norm has a weight: RMSNorms of the embedding, before each branch, at the end, and of queries and keys, after the
  rotation. Files hold no tensor of a norm.
- Rotary turns the other way: pairs (a, b) become (a cos + b sin, b cos - a sin).
- The MLP has no gate; its activation is the squared ReLU.
- Logits have a soft cap, 15 where the config is silent; null is none. transformers reads no other name of it than
  `final_logit_softcapping`: earlier files' `logits_soft_cap` must be what it takes anyway.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    QK_NORM,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    Derived,
    Key,
    PositionKeys,
    norm_key,
)
from hooklens.adapters.tables import llama_rules, mlp_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="relu2"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6, weight=False),
        QK_NORM,
        Derived(lambda fields: {"embed_norm": fields["norm"]}),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("final_logit_softcapping", "logits_softcap", float, default=15.0, nullable=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(reverse=True),
    ),
    pinned={"logits_soft_cap": 15.0, "logits_softcap": 15.0},
    fixed={"gated_mlp": False, "mlp_bias": False, "qk_norm_after_rotary": True},
)

FAMILY = Family(
    name="nanochat",
    model_types=("nanochat",),
    architectures=("NanoChatForCausalLM", "NanoChatModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(mlp=mlp_rules("model.layers.{i}.mlp", up="fc1", down="fc2")),
)
