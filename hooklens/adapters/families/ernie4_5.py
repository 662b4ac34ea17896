"""ERNIE 4.5 (Baidu ERNIE Team 2025, "ERNIE 4.5 Technical Report"), the dense models.

Checkpoints: baidu/ERNIE-4.5-0.3B-PT, ERNIE-4.5-0.3B-Base-PT.

Peculiarities:
- Llama's network and names with rotary that pairs neighbours (interleaved), at a base of 5e5 where the config is
  silent.
- `use_bias` gives all maps of a block their biases.
- `head_dim` is 128 where the config is silent, whatever `hidden_size` is.
- The unembedding is tied where the config is silent.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=128, nullable=True),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-5),
        BiasFlag("use_bias", ("qkv_bias", "out_bias", "mlp_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=131072, default_base=500000.0, layout="interleaved"),
    ),
    fixed={"gated_mlp": True},
)

FAMILY = Family(
    name="ernie4_5",
    model_types=("ernie4_5",),
    architectures=("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM", "Ernie4_5Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
