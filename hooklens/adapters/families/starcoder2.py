"""StarCoder2 (Lozhkov et al. 2024, "StarCoder 2 and The Stack v2: The Next Generation").

Checkpoints: bigcode/starcoder2-3b, starcoder2-7b, starcoder2-15b.

Peculiarities:
- Llama's wiring and names around LayerNorms with bias and a plain MLP (`c_fc`, `c_proj`, stored as linear maps).
- `use_bias` gives all maps of a block their biases, and is on where the config is silent.
- One sliding window for all layers; none where the config is silent.
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
    WindowKeys,
    norm_key,
)
from hooklens.adapters.tables import llama_rules, mlp_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="gelu_pytorch_tanh"),
        norm_key("norm_epsilon", "layer", default_eps=1e-5),
        BiasFlag("use_bias", ("qkv_bias", "out_bias", "mlp_bias"), default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.018042),
        PositionKeys(default_n_ctx=4096),
        WindowKeys(typed=False),
    ),
    fixed={"gated_mlp": False},
    pinned={"mlp_type": "default", "norm_type": "layer_norm"},
)

FAMILY = Family(
    name="starcoder2",
    model_types=("starcoder2",),
    architectures=("Starcoder2ForCausalLM", "Starcoder2Model"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(mlp=mlp_rules("model.layers.{i}.mlp", up="c_fc", down="c_proj")),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
