"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Checkpoints: openai-community/gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, DialoGPT, the runs of Mistral-CRFM
(stanford-crfm/*), and every other checkpoint whose `model_type` is `gpt2`.

Peculiarities:
- Linear maps lie as `[in, out]` (`Conv1D`): queries, keys and values are three blocks of columns of one tensor.
- `scale_attn_weights: false` is a factor of 1 on the scores; `scale_attn_by_inverse_layer_idx` divides the factor of
  layer i by i + 1. The runs of Mistral-CRFM have the latter.
- `reorder_and_upcast_attn` changes the precision of the scores and not the function (transformers' `sdpa` ignores it).
- Files of OpenAI's checkpoints begin at the base model: no name has `transformer.` before it. They hold the causal mask
  of every layer, too, which is no weight.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    SHORT_SIZE_KEYS,
    ActivationKey,
    Computed,
    ConfigMap,
    ConfigReader,
    FixedPositionKeys,
    Key,
    norm_key,
)
from hooklens.adapters.tables import (
    BLOCK,
    Rules,
    decoder_rules,
    fused_conv1d_qkv_rules,
    mlp_rules,
    norm_rules,
    out_rules,
)
from hooklens.config import LearnedPositions

_SCALE_KEYS = ("scale_attn_weights", "scale_attn_by_inverse_layer_idx")


def _attn_scale(n_layers: int, d_head: int, *, scaled: bool, by_layer: bool) -> float | tuple[float, ...] | None:
    """`attn_scale` as `HookedConfig` has it: None where it is the usual one, no tuple where layers are alike."""
    usual = d_head**-0.5 if scaled else 1.0
    factors = tuple(usual / (layer + 1) for layer in range(n_layers)) if by_layer else (usual,)
    if len(factors) > 1:
        return factors
    return None if scaled else usual


def _read_scale(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    scaled, by_layer = reader.get("scale_attn_weights", bool, True), reader.get(_SCALE_KEYS[1], bool, False)
    n_layers = len(reader.layers(fields.get("n_layers", 0)))
    if reader.problems:
        return {}
    d_head = fields["d_model"] // max(fields["n_heads"], 1)
    return {"attn_scale": _attn_scale(n_layers, max(d_head, 1), scaled=scaled, by_layer=by_layer)}


def _write_scale(fields: Mapping[str, Any]) -> dict[str, Any]:
    settings = ((True, False), (False, False), (True, True), (False, True))
    for scaled, by_layer in settings:
        scale = _attn_scale(fields["n_layers"], fields["d_head"], scaled=scaled, by_layer=by_layer)
        if scale == fields["attn_scale"]:
            return dict(zip(_SCALE_KEYS, (scaled, by_layer), strict=True))
    # Another scale differs from what is read back, and is refused there.
    return dict(zip(_SCALE_KEYS, settings[0], strict=True))


_CONFIG = ConfigMap(
    parts=(
        *SHORT_SIZE_KEYS,
        Key("n_inner", "d_mlp", int, default=None),
        ActivationKey("activation_function", default="gelu_new"),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5),
        Computed(_SCALE_KEYS, _read_scale, _write_scale),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        FixedPositionKeys(
            positions=LearnedPositions(), n_ctx="n_positions", alias="max_position_embeddings", default_n_ctx=1024
        ),
    ),
    # `n_ctx` repeats `n_positions`; what transformers reads is the latter.
    inert=("n_ctx", "n_special", "predict_special_tokens", "reorder_and_upcast_attn"),
)

_LAYER = "transformer.h.{i}"

_BLOCKS: Rules = (
    *norm_rules(f"{_LAYER}.ln_1", f"{BLOCK}.ln1"),
    *fused_conv1d_qkv_rules(f"{_LAYER}.attn.c_attn"),
    *out_rules(f"{_LAYER}.attn.c_proj", conv1d=True),
    *norm_rules(f"{_LAYER}.ln_2", f"{BLOCK}.ln2"),
    *mlp_rules(f"{_LAYER}.mlp", up="c_fc", down="c_proj", conv1d=True),
)

FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_BLOCKS, embed="transformer.wte", pos_embed="transformer.wpe", final_norm="transformer.ln_f"),
    weightless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
