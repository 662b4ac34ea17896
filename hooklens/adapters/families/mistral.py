"""Mistral (Jiang et al. 2023, "Mistral 7B").

Checkpoints: mistralai/Mistral-7B-v0.1 to v0.3, Mistral-Nemo-Base-2407 (a head size of its own), Mistral-Small, Zephyr
and every other checkpoint whose `model_type` is `mistral`.

Peculiarities:
- Llama's network and names, without any bias; Llama's keys for them stand in merged checkpoints and must say so.
- One sliding window for all layers: 4096 where the config is silent, none where it says null (from v0.2 on). A config
  with `layer_types` is Ministral's.
"""

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, ConfigMap, Key, PositionKeys, WindowKeys, norm_key
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, default=8),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=131072),
        WindowKeys(default=4096, typed=False),
    ),
    fixed={"gated_mlp": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    pinned={"attention_bias": False, "mlp_bias": False},
)

FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    architectures=("MistralForCausalLM", "MistralModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
