"""BLOOM (BigScience Workshop 2022, "BLOOM: A 176B-Parameter Open-Access Multilingual Language Model").

Checkpoints: bigscience/bloom-560m to bloom, bloomz-* (Muennighoff et al. 2022).

Peculiarities:
- ALiBi is added to the scaled scores, and rounded to the dtype of the activations only in transformers.
- The token embedding is normed before block 0.
- Queries, keys and values of a head lie together in one tensor; all linear maps have biases.
- The MLP is four times as wide as the stream, with the tanh approximation of GELU; neither has a key.
- The width of the stream is `hidden_size`, or `n_embed` in older configs; the training length is `seq_length`, which
  transformers ignores, ALiBi going on beyond it.
- Files of the first checkpoints begin at the base model: no name has `transformer.` before it.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import ConfigMap, Derived, FixedPositionKeys, Key, norm_key
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


def _derive_embed_norm(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"embed_norm": fields["norm"]}


_CONFIG = ConfigMap(
    parts=(
        Key("vocab_size", "d_vocab", int),
        Key("hidden_size", "d_model", int, alias="n_embed"),
        Key("n_layer", "n_layers", int, alias="num_hidden_layers"),
        Key("n_head", "n_heads", int, alias="num_attention_heads"),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5),
        Derived(_derive_embed_norm),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        FixedPositionKeys(positions=AlibiPositions(), n_ctx="seq_length"),
    ),
    fixed={"act_fn": "gelu_tanh"},
    pinned={"apply_residual_connection_post_layernorm": False, "n_inner": None},
    # Settings of the program that trained it, which transformers ignores.
    inert=(
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "slow_but_exact",
    ),
)

_LAYER = "transformer.h.{i}"

_BLOCKS: Rules = (
    *norm_rules("transformer.word_embeddings_layernorm", "embed.ln"),
    *norm_rules(f"{_LAYER}.input_layernorm", f"{BLOCK}.ln1"),
    *fused_qkv_rules(f"{_LAYER}.self_attention.query_key_value", order="grouped"),
    *out_rules(f"{_LAYER}.self_attention.dense"),
    *norm_rules(f"{_LAYER}.post_attention_layernorm", f"{BLOCK}.ln2"),
    *mlp_rules(f"{_LAYER}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
)

FAMILY = Family(
    name="bloom",
    model_types=("bloom",),
    architectures=("BloomForCausalLM", "BloomModel"),
    base_prefix="transformer.",
    embedding="transformer.word_embeddings.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_BLOCKS, embed="transformer.word_embeddings", final_norm="transformer.ln_f"),
    peculiar=dict.fromkeys(
        (f"{_LAYER}.self_attention.output", f"{_LAYER}.mlp.output"), "the module adds the stream and gives the sum"
    ),
)
