"""Persimmon (Elsen et al. 2023, "Releasing Persimmon-8B").

Checkpoints: adept/persimmon-8b-base, persimmon-8b-chat.

Peculiarities:
- Queries, keys and values lie in one tensor, those of each head together; each head has keys of its own.
- A LayerNorm with bias over each head's query and key, one for all heads, before rotary (`qk_layernorm`, on where the
  config is silent).
- LayerNorms with bias; every map of a block has a bias; the MLP is plain, with squared ReLU.
- Rotary turns the first half of each head where the config is silent; the published base is 25000.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
    Computed,
    ConfigMap,
    ConfigReader,
    Key,
    PositionKeys,
    norm_key,
    qk_norm_flag,
)
from hooklens.adapters.tables import fused_qkv_rules, llama_rules, mlp_rules, out_rules, qk_norm_rules


def _check_kv_heads(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    n_heads = fields["n_heads"]
    if reader.get("num_key_value_heads", int, n_heads) != n_heads:
        reader.reject("num_key_value_heads", f"num_attention_heads = {n_heads}, as each head has keys of its own")
    return {}


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Computed(("num_key_value_heads",), _check_kv_heads, lambda fields: {}),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="relu2"),
        norm_key("layer_norm_eps", "layer", default_eps=1e-5),
        qk_norm_flag(default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=16384, fraction="partial_rotary_factor", default_fraction=0.5),
    ),
    fixed={"gated_mlp": False},
)

_ATTENTION = "model.layers.{i}.self_attn"

FAMILY = Family(
    name="persimmon",
    model_types=("persimmon",),
    architectures=("PersimmonForCausalLM", "PersimmonModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        attention=(
            *fused_qkv_rules(f"{_ATTENTION}.query_key_value", order="grouped"),
            *out_rules(f"{_ATTENTION}.dense"),
            *qk_norm_rules(_ATTENTION, q="q_layernorm", k="k_layernorm"),
        ),
        mlp=mlp_rules("model.layers.{i}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
        final_norm="final_layernorm",
    ),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
