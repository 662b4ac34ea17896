"""Falcon (Almazrouei et al. 2023, "The Falcon Series of Open Language Models").

Checkpoints: tiiuae/falcon-rw-1b (ALiBi, multi-head, sequential, biases), falcon-7b (multi-query, parallel, one
norm), falcon-40b and falcon-180B (new decoder: grouped queries, parallel, two norms), falcon-11B (Falcon2: new
decoder, one norm), and the same in the old `RefinedWeb` / `RefinedWebModel` dialect.

Peculiarities:
- Queries, keys and values lie in one tensor, grouped by key-value head in every variant.
- The new decoder is always parallel and ignores `multi_query` and `parallel_attn`; in the old one `multi_query`
  means one key-value head whatever `num_kv_heads` says.
- The names of the norms depend on the variant: `ln_attn` and `ln_mlp` where a parallel block has two.
- ALiBi is scaled together with the scores and rounded to bfloat16, as transformers does even in float32
  (`AlibiPositions(scaled=True, bfloat16=True)`); take `bfloat16=False` for the exact biases.
- The unembedding is tied where the config is silent; Falcon2 11B unties it.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    ActivationKey,
    BiasFlag,
    Computed,
    ConfigMap,
    ConfigReader,
    Key,
    PositionKeys,
    norm_key,
)
from hooklens.adapters.tables import BLOCK, Rules, decoder_rules, fused_qkv_rules, mlp_rules, norm_rules, out_rules
from hooklens.config import HookedConfig

_STRUCTURE_KEYS = (
    "new_decoder_architecture",
    "multi_query",
    "parallel_attn",
    "num_kv_heads",
    "num_ln_in_parallel_attn",
)


def _read_structure(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    new_decoder = reader.get("new_decoder_architecture", bool, False)
    multi_query = reader.get("multi_query", bool, True)
    parallel = reader.get("parallel_attn", bool, True)
    kv_heads = reader.get("num_kv_heads", int, fields["n_heads"])
    n_norms = reader.get("num_ln_in_parallel_attn", int, 2 if new_decoder else 1)
    if new_decoder:
        if n_norms not in (1, 2):
            reader.reject("num_ln_in_parallel_attn", "1 or 2")
        return {"n_kv_heads": kv_heads, "wiring": "parallel", "shared_norm": n_norms == 1}
    if parallel and n_norms == 2:
        reader.reject("num_ln_in_parallel_attn", "1 with new_decoder_architecture false (transformers cannot run 2)")
    return {
        "n_kv_heads": 1 if multi_query else fields["n_heads"],
        "wiring": "parallel" if parallel else "sequential",
        "shared_norm": parallel,
    }


def _write_structure(fields: Mapping[str, Any]) -> dict[str, Any]:
    parallel, shared_norm = fields["wiring"] == "parallel", fields["shared_norm"]
    grouped = fields["n_kv_heads"] not in (1, fields["n_heads"])
    new_decoder = (parallel and not shared_norm) or grouped
    return {
        "new_decoder_architecture": new_decoder,
        "multi_query": fields["n_kv_heads"] == 1,
        "parallel_attn": parallel,
        "num_kv_heads": fields["n_kv_heads"],
        "num_ln_in_parallel_attn": (1 if shared_norm else 2) if new_decoder else None,
    }


def _translate_refined_web(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the dialect of the first releases, whose own code took other names and defaults."""
    names = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
    renamed = {names.get(key, key): value for key, value in config.items()}
    # Only the 40B code had this key, and that code was the new decoder.
    new_decoder = config.get("n_head_kv") is not None
    defaults = {"multi_query": False, "parallel_attn": False, "new_decoder_architecture": new_decoder}
    return {**defaults, **renamed, "model_type": "falcon"}


_CONFIG = ConfigMap(
    parts=(
        Key("vocab_size", "d_vocab", int),
        Key("hidden_size", "d_model", int, alias="n_embed"),
        Key("num_hidden_layers", "n_layers", int),
        Key("num_attention_heads", "n_heads", int),
        Key("ffn_hidden_size", "d_mlp", int, default=None),
        Computed(_STRUCTURE_KEYS, _read_structure, _write_structure),
        ActivationKey("activation", default="gelu"),
        norm_key("layer_norm_epsilon", "layer", default_eps=1e-5),
        BiasFlag("bias", ("qkv_bias", "out_bias", "mlp_bias"), default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=True),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(alibi="alibi"),
    ),
    pinned={"apply_residual_connection_post_layernorm": False},
)


def _has_two_parallel_norms(cfg: HookedConfig) -> bool:
    return cfg.wiring == "parallel" and not cfg.shared_norm


_LAYER = "transformer.h.{i}"

_WEIGHTS: Rules = (
    *norm_rules(f"{_LAYER}.ln_attn", f"{BLOCK}.ln1", when=_has_two_parallel_norms),
    *norm_rules(f"{_LAYER}.ln_mlp", f"{BLOCK}.ln2", when=_has_two_parallel_norms),
    *norm_rules(f"{_LAYER}.input_layernorm", f"{BLOCK}.ln1", when=lambda cfg: not _has_two_parallel_norms(cfg)),
    *norm_rules(f"{_LAYER}.post_attention_layernorm", f"{BLOCK}.ln2", when=lambda cfg: cfg.wiring == "sequential"),
    *fused_qkv_rules(f"{_LAYER}.self_attention.query_key_value", order="grouped"),
    *out_rules(f"{_LAYER}.self_attention.dense"),
    *mlp_rules(f"{_LAYER}.mlp", up="dense_h_to_4h", down="dense_4h_to_h"),
)

FAMILY = Family(
    name="falcon",
    model_types=("falcon",),
    architectures=("FalconForCausalLM", "RWForCausalLM", "FalconModel"),
    base_prefix="transformer.",
    embedding="transformer.word_embeddings.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_WEIGHTS, embed="transformer.word_embeddings", final_norm="transformer.ln_f"),
    weightless=(r"transformer\.h\.\d+\.self_attention\.(rotary_emb|maybe_rotary)\.inv_freq",),
    dialects=dict.fromkeys(("RefinedWeb", "RefinedWebModel"), _translate_refined_web),
)
