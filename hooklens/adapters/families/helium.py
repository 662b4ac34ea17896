"""Helium (Kyutai 2025, "Helium-1: a modular and multilingual LLM").

Checkpoints: kyutai/helium-1-preview-2b. Those without `preview` in their names are of the Llama family.

Peculiarities:
- Llama's network and names with rotary that pairs neighbours (interleaved), at a base of 1e5 where the config is
  silent.
- `attention_bias` gives queries, keys and values biases, and never the output; `mlp_bias` all maps of the MLP.
- The output map is `hidden_size` wide on both sides: heads times `head_dim` (128 where the config is silent) must
  be `hidden_size`.
- The weight of a norm acts in float32, before the result is rounded.
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
)
from hooklens.adapters.tables import llama_rules


def _check_heads(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    d_model, n_heads = fields["d_model"], fields["n_heads"]
    if "d_head" in fields and fields["d_head"] * n_heads != d_model:
        reader.reject("head_dim", f"hidden_size / num_attention_heads = {d_model} / {n_heads}")
    return {}


_HEADS_FILL_STREAM = Computed((), _check_heads, lambda fields: {})

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=128, nullable=True),
        _HEADS_FILL_STREAM,
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-8, wide_weight=True),
        Key("attention_bias", "qkv_bias", bool, default=False),
        Key("mlp_bias", "mlp_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=4096, default_base=100000.0, layout="interleaved"),
    ),
    fixed={"gated_mlp": True, "out_bias": False},
)

FAMILY = Family(
    name="helium",
    model_types=("helium",),
    architectures=("HeliumForCausalLM", "HeliumModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
