"""Ministral (Mistral AI 2024, "Un Ministral, des Ministraux").

Checkpoints: mistralai/Ministral-8B-Instruct-2410.

Peculiarities:
- Mistral's network, in which `layer_types` says which layers have a sliding window; all have it where that is absent.
- The published config names the `model_type` `mistral`. As in transformers, one that has `layer_types` is of this
  family, and it is written under this family's name.
- The window is 4096 where the config is silent, none where it says null. transformers 5 cannot run null: a network
  without windows is written with layers that do not slide.
- transformers 5 cannot build a model whose `head_dim` is null; here that is `hidden_size / num_attention_heads`.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import SIZE_KEYS, ActivationKey, ConfigMap, Key, PositionKeys, WindowKeys, norm_key
from hooklens.adapters.tables import llama_rules

_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int, nullable=True),
        Key("head_dim", "d_head", int, default=None),
        Key("intermediate_size", "d_mlp", int),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "rms", default_eps=1e-6),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(default_n_ctx=131072),
        WindowKeys(default=4096, nullable=False),
    ),
    fixed={"gated_mlp": True, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
)

_MISTRALS = {"MistralForCausalLM", "MistralModel"}


def _has_types_of_layers(config: Mapping[str, Any]) -> bool:
    """Whether a config in Mistral's name says which of its layers slide, which Mistral's own never do."""
    architectures = config.get("architectures") or _MISTRALS
    return config.get("model_type") == "mistral" and "layer_types" in config and not _MISTRALS.isdisjoint(architectures)


FAMILY = Family(
    name="ministral",
    model_types=("ministral",),
    architectures=("MinistralForCausalLM", "MinistralModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(),
    weightless=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    adopts=_has_types_of_layers,
)
