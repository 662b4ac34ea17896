"""OPT (Zhang et al. 2022, "OPT: Open Pre-trained Transformer Language Models") and Galactica (Taylor et al. 2022).

Checkpoints: facebook/opt-125m to opt-66b, opt-350m, opt-iml-*, facebook/galactica-*.

Peculiarities:
- The table of positions has two rows before position 0.
- opt-350m is another network: norms of the stream itself (`do_layer_norm_before: false`) and none before the
  unembedding, and a token embedding half as wide as the stream (`word_embed_proj_dim`), projected on the way in and
  out.
- The norm before the MLP has the name `final_layer_norm` in the layer, as the last one has outside of it.
- `enable_bias` covers all linear maps of the blocks; `layer_norm_elementwise_affine: false` is norms without weight and
  bias. The norms' epsilon is always 1e-5.
- `_remove_final_layer_norm` is of checkpoints that were fine-tuned in a release that lacked the final norm.
- Files of Meta's checkpoints begin at the base model: names begin with `decoder.`.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    Computed,
    ConfigMap,
    ConfigReader,
    FixedPositionKeys,
    Key,
)
from hooklens.adapters.rules import Copy
from hooklens.adapters.tables import BLOCK, Rules, decoder_rules, fairseq_block_rules, norm_rules
from hooklens.config import LearnedPositions, NormConfig

_NORM_KEYS = ("do_layer_norm_before", "layer_norm_elementwise_affine", "_remove_final_layer_norm")


def _read_norms(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    before = reader.get("do_layer_norm_before", bool, True)
    affine = reader.get("layer_norm_elementwise_affine", bool, True)
    removed = reader.get("_remove_final_layer_norm", bool, False)
    norm = NormConfig(kind="layer", eps=1e-5, weight=affine, bias=affine)
    return {
        "norm": norm,
        "norm_before": before,
        "norm_stream": not before,
        "final_norm": norm if before and not removed else None,
    }


def _write_norms(fields: Mapping[str, Any]) -> dict[str, Any]:
    norm, before = fields["norm"], fields["norm_before"] is True
    return {
        "do_layer_norm_before": before,
        "layer_norm_elementwise_affine": not isinstance(norm, NormConfig) or norm.weight,
        "_remove_final_layer_norm": before and fields["final_norm"] is None,
    }


def _read_embedding(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    width = reader.get("word_embed_proj_dim", int, None)
    return {"d_embed": None if width == fields.get("d_model") else width}


def _write_embedding(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"word_embed_proj_dim": fields["d_embed"] or fields["d_model"]}


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("ffn_dim", "d_mlp", int),
        Computed(("word_embed_proj_dim",), _read_embedding, _write_embedding),
        ActivationKey("activation_function", default="relu"),
        Computed(_NORM_KEYS, _read_norms, _write_norms),
        BiasFlag("enable_bias", ("qkv_bias", "out_bias", "mlp_bias"), default=True),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("init_std", "init_std", float, default=0.02),
        FixedPositionKeys(positions=LearnedPositions(offset=2)),
    ),
)

_DECODER = "model.decoder"
_LAYER = f"{_DECODER}.layers.{{i}}"

_BLOCKS: Rules = (
    Copy(f"{_DECODER}.project_in.weight", "embed.W_proj_in", "m d -> d m"),
    *fairseq_block_rules(_LAYER),
    *norm_rules(f"{_LAYER}.self_attn_layer_norm", f"{BLOCK}.ln1_stream"),
    *norm_rules(f"{_LAYER}.final_layer_norm", f"{BLOCK}.ln2_stream"),
    Copy(f"{_DECODER}.project_out.weight", "unembed.W_proj_out", "d m -> m d"),
)

FAMILY = Family(
    name="opt",
    model_types=("opt",),
    architectures=("OPTForCausalLM", "OPTModel"),
    base_prefix="model.",
    embedding=f"{_DECODER}.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(
        _BLOCKS,
        embed=f"{_DECODER}.embed_tokens",
        pos_embed=f"{_DECODER}.embed_positions",
        final_norm=f"{_DECODER}.final_layer_norm",
    ),
)
