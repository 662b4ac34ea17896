"""GPTBigCode: SantaCoder (Ben Allal et al. 2023) and StarCoder (Li et al. 2023, "StarCoder: may the source be with
you!").

Checkpoints: bigcode/starcoder, starcoderbase-1b to starcoderbase, gpt_bigcode-santacoder, tiny_starcoder_py,
HuggingFaceH4/starchat-*.

Peculiarities:
- GPT-2's network and names, but linear maps lie as `[out, in]`.
- One key-value head for all queries (`multi_query`, where the config is silent, too); without, queries, keys and values
  of a head lie together, not in GPT-2's three blocks.
- `scale_attn_weights: false` is a factor of 1 on the scores.
- `attention_softmax_in_fp32` and `scale_attention_softmax_in_fp32` change precision and not the function.
- Old files hold the causal mask of every layer; it is no weight.
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
from hooklens.adapters.tables import BLOCK, Rules, decoder_rules, fused_qkv_rules, mlp_rules, norm_rules, out_rules
from hooklens.config import LearnedPositions


def _read_heads(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    reader.used.add("num_key_value_heads")
    return {"n_kv_heads": 1 if reader.get("multi_query", bool, True) else fields["n_heads"]}


def _write_heads(fields: Mapping[str, Any]) -> dict[str, Any]:
    # Other numbers of heads differ from what is read back, and are refused there.
    return {"multi_query": fields["n_kv_heads"] == 1}


_CONFIG = ConfigMap(
    parts=(
        *SHORT_SIZE_KEYS,
        Computed(("multi_query", "num_key_value_heads"), _read_heads, _write_heads),
        Key("n_inner", "d_mlp", int, default=None),
        ActivationKey("activation_function", default="gelu_pytorch_tanh"),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5),
        Key(
            "scale_attn_weights",
            "attn_scale",
            bool,
            default=True,
            decode=lambda scaled: None if scaled else 1.0,
            encode=lambda scale: scale is None,
        ),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        FixedPositionKeys(
            positions=LearnedPositions(), n_ctx="n_positions", alias="max_position_embeddings", default_n_ctx=1024
        ),
    ),
    inert=(
        "attention_softmax_in_fp32",
        "inference_runner",
        "max_batch_size",
        "n_ctx",
        "pad_key_length",
        "pre_allocate_kv_cache",
        "runner_max_sequence_length",
        "scale_attention_softmax_in_fp32",
        "validate_runner_input",
    ),
)

_LAYER = "transformer.h.{i}"

_BLOCKS: Rules = (
    *norm_rules(f"{_LAYER}.ln_1", f"{BLOCK}.ln1"),
    *fused_qkv_rules(f"{_LAYER}.attn.c_attn", order="grouped"),
    *out_rules(f"{_LAYER}.attn.c_proj"),
    *norm_rules(f"{_LAYER}.ln_2", f"{BLOCK}.ln2"),
    *mlp_rules(f"{_LAYER}.mlp", up="c_fc", down="c_proj"),
)

FAMILY = Family(
    name="gpt_bigcode",
    model_types=("gpt_bigcode",),
    architectures=("GPTBigCodeForCausalLM", "GPTBigCodeModel"),
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_BLOCKS, embed="transformer.wte", pos_embed="transformer.wpe", final_norm="transformer.ln_f"),
    weightless=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
)
