"""MPT (MosaicML NLP Team 2023, "Introducing MPT-7B: A New Standard for Open-Source, Commercially Usable LLMs").

Checkpoints: mosaicml/mpt-7b, mpt-7b-instruct, mpt-7b-chat, mpt-7b-8k, mpt-30b, and others whose `model_type` is `mpt`.

Peculiarities:
- No bias anywhere, in norms neither. ALiBi is added to the scaled scores in float32.
- `attn_config.clip_qkv` holds queries, keys and values within bounds; `attn_config.softmax_scale` is the factor on the
  scores.
- The MLP is four times as wide as the stream, with the exact GELU.
- transformers ignores several settings of MosaicML's own code and computes as if they had one value: those values alone
  are read (`attn_config.alibi` and `qk_ln`, `prefix_lm`, `alibi_bias_max`, ..., `expansion_ratio`, `no_bias`,
  `logit_scale`). MPT-7B-StoryWriter is refused for its `alibi_bias_max` of 16.
- `learned_pos_emb` is true in all checkpoints, and there is no table: ALiBi takes its place.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import Computed, ConfigMap, ConfigReader, FixedPositionKeys, Key, norm_key
from hooklens.adapters.tables import (
    BLOCK,
    Rules,
    decoder_rules,
    fused_qkv_rules,
    mlp_rules,
    norm_rules,
    out_rules,
)
from hooklens.config import AlibiPositions

# The value that transformers computes with, whatever the config says.
_PINNED_IN_ATTENTION = {
    "alibi": True,
    "alibi_bias_max": 8,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "prefix_lm": False,
    "qk_gn": False,
    "qk_ln": False,
    "rope": False,
}


def _read_attention(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    attention = reader.nested("attn_config")
    for key, value in _PINNED_IN_ATTENTION.items():
        if attention.get(key, type(value), value) != value:
            attention.reject(key, f"{value!r}, the only value that transformers computes with")
    attention.used.update(("attn_impl", "attn_pdrop", "model_type"))
    # Zero is no clipping in transformers.
    return {
        "clip_qkv": attention.get("clip_qkv", float, None) or None,
        "attn_scale": attention.get("softmax_scale", float, None),
    }


def _write_attention(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"attn_config": {"alibi": True, "clip_qkv": fields["clip_qkv"], "softmax_scale": fields["attn_scale"]}}


_CONFIG = ConfigMap(
    parts=(
        Key("vocab_size", "d_vocab", int),
        Key("d_model", "d_model", int, alias="hidden_size"),
        Key("n_layers", "n_layers", int, alias="num_hidden_layers"),
        Key("n_heads", "n_heads", int, alias="num_attention_heads"),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5, bias=False),
        Computed(("attn_config",), _read_attention, _write_attention),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        FixedPositionKeys(positions=AlibiPositions(), n_ctx="max_seq_len"),
    ),
    fixed={"act_fn": "gelu", "qkv_bias": False, "out_bias": False, "mlp_bias": False},
    pinned={"expansion_ratio": 4, "logit_scale": None, "no_bias": True},
    inert=(
        "embedding_fraction",
        "fc_type",
        "init_config",
        "init_device",
        "learned_pos_emb",
        "norm_type",
        "tokenizer_name",
        "use_pad_tok_in_ffn",
        "verbose",
    ),
)

_LAYER = "transformer.blocks.{i}"

_BLOCKS: Rules = (
    *norm_rules(f"{_LAYER}.norm_1", f"{BLOCK}.ln1"),
    *fused_qkv_rules(f"{_LAYER}.attn.Wqkv", order="blocked"),
    *out_rules(f"{_LAYER}.attn.out_proj"),
    *norm_rules(f"{_LAYER}.norm_2", f"{BLOCK}.ln2"),
    *mlp_rules(f"{_LAYER}.ffn", up="up_proj", down="down_proj"),
)

FAMILY = Family(
    name="mpt",
    model_types=("mpt",),
    architectures=("MptForCausalLM", "MPTForCausalLM", "MptModel"),
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_BLOCKS, embed="transformer.wte", final_norm="transformer.norm_f"),
    peculiar={f"{_LAYER}.ffn.output": "the module adds the stream and gives the sum"},
)
