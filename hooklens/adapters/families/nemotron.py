"""Nemotron-4 and Minitron (Parmar et al. 2024, "Nemotron-4 15B Technical Report"; Muralidharan et al. 2024, "Compact
Language Models via Pruning and Knowledge Distillation").

Checkpoints: nvidia/Minitron-4B-Base, Minitron-8B-Base, Nemotron-Mini-4B-Instruct, Nemotron-4-340B-*-hf.

Peculiarities:
- LayerNorms whose weight acts as `1 + w` (LayerNorm1p), with bias.
- The MLP is plain, with squared ReLU; its maps are called `up_proj` and `down_proj`.
- Rotary turns the first half of each head where the config is silent.
- `kv_channels` counts for nothing: the size of a head is `head_dim`, or `hidden_size / num_attention_heads`.
- `attention_bias` covers all four maps of attention, `mlp_bias` both of the MLP; no published model has either.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, BiasFlag, ConfigMap, Key, PositionKeys, norm_key
from hooklens.adapters.tables import llama_rules, mlp_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=None),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="relu2"),
        norm_key("norm_eps", "layer", default_eps=1e-5, unit_offset=True),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("mlp_bias", "mlp_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.0134),
        PositionKeys(default_n_ctx=4096, fraction="partial_rotary_factor", default_fraction=0.5),
    ),
    fixed={"gated_mlp": False},
    inert={"kv_channels"},
)

FAMILY = Family(
    name="nemotron",
    model_types=("nemotron",),
    architectures=("NemotronForCausalLM", "NemotronModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(mlp=mlp_rules("model.layers.{i}.mlp", up="up_proj", down="down_proj")),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
