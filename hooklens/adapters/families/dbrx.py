"""DBRX (Databricks 2024, "Introducing DBRX: A New State-of-the-Art Open LLM").

Checkpoints: databricks/dbrx-base, databricks/dbrx-instruct, and copies of them, whose `model_type` is `dbrx`.

Peculiarities:
- LayerNorms without bias, and no other bias; their epsilon is not in the config.
- Queries, keys and values lie in one tensor, and are held between `attn_config.clip_qkv` and minus that.
- All experts lie in one tensor for each map, one below the other: `w1` is the gate, `v1` the linear half, and `w2` the
  way out, transposed.
- The gates of the chosen experts are divided by their p-norm, p being `ffn_config.moe_normalize_expert_weights`: 1
  where the config is silent, none where it says null.
- Published configs have the rotary base in `attn_config.rope_theta` only (500000). The released code reads it there;
  transformers 5 asks for it and computes with 10000 all the same, unless the base stands at the top of the config,
  too. HookLens takes what stands at the top, and else `attn_config`'s, and writes it to both places, so that
  transformers computes the same of what is saved.
- The unembedding is never tied.
"""

from collections.abc import Mapping
from typing import Any

from hooklens.adapters.family import Config, Family
from hooklens.adapters.keys import ActivationKey, Computed, ConfigMap, ConfigReader, Key, MixtureKeys, PositionKeys
from hooklens.adapters.rules import Copy
from hooklens.adapters.tables import (
    BLOCK,
    Rules,
    decoder_rules,
    fused_qkv_rules,
    norm_rules,
    out_rules,
    router_rules,
)
from hooklens.config import NormConfig, RotaryPositions

# Of training, and what transformers writes into every config, nested ones too.
_INERT_IN_ATTENTION = ("attn_pdrop", "rope_theta", "tie_word_embeddings")
_INERT_IN_MIXTURE = ("hidden_size", "moe_jitter_eps", "moe_loss_weight", "tie_word_embeddings")
_ACTIVATION = ActivationKey("name", default="silu")


def _lift_base(config: Config) -> dict[str, Any]:
    """The rotary base at the top of the config, where HookLens and transformers read it."""
    attention = config.get("attn_config")
    base = attention.get("rope_theta") if isinstance(attention, Mapping) else None
    said = any(config.get(key) for key in ("rope_theta", "rope_scaling", "rope_parameters"))
    return dict(config) if said or base is None else {**config, "rope_theta": base}


def _read_attention(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    attention = reader.nested("attn_config")
    attention.used.update(_INERT_IN_ATTENTION)
    return {
        "n_kv_heads": attention.get("kv_n_heads", int),
        "clip_qkv": attention.get("clip_qkv", float, None),
    }


def _write_attention(fields: Mapping[str, Any]) -> dict[str, Any]:
    positions = fields["positions"]
    base = {"rope_theta": positions.base} if isinstance(positions, RotaryPositions) else {}
    return {"attn_config": {"kv_n_heads": fields["n_kv_heads"], "clip_qkv": fields["clip_qkv"], **base}}


def _read_mixture(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    mixture = reader.nested("ffn_config")
    mixture.used.update(_INERT_IN_MIXTURE)
    if mixture.get("uniform_expert_assignment", bool, False):
        mixture.reject("uniform_expert_assignment", "false: the router chooses")
    norm = mixture.get("moe_normalize_expert_weights", float, 1.0)
    return {
        "n_experts": mixture.get("moe_num_experts", int),
        "experts_per_token": mixture.get("moe_top_k", int),
        "d_expert": mixture.get("ffn_hidden_size", int),
        "gate_norm": None if mixture.is_null("moe_normalize_expert_weights") else norm,
        **_ACTIVATION.read(mixture.nested("ffn_act_fn"), fields),
    }


def _write_mixture(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ffn_config": {
            "moe_num_experts": fields["n_experts"],
            "moe_top_k": fields["experts_per_token"],
            "ffn_hidden_size": fields["d_expert"],
            "moe_normalize_expert_weights": fields["gate_norm"],
            "ffn_act_fn": _ACTIVATION.write(fields),
        }
    }


_CONFIG = ConfigMap(
    parts=(
        Key("vocab_size", "d_vocab", int),
        Key("d_model", "d_model", int, alias="hidden_size"),
        Key("n_layers", "n_layers", int, alias="num_hidden_layers"),
        Key("n_heads", "n_heads", int, alias="num_attention_heads"),
        Computed(("attn_config",), _read_attention, _write_attention),
        Key("initializer_range", "init_std", float, default=0.02),
        PositionKeys(n_ctx="max_seq_len"),
        MixtureKeys(options=(Computed(("ffn_config",), _read_mixture, _write_mixture),)),
    ),
    fixed={
        "act_fn": "silu",
        "gated_mlp": True,
        "norm": NormConfig(kind="layer", eps=1e-5, bias=False),
        "qkv_bias": False,
        "out_bias": False,
        "mlp_bias": False,
        "tied_unembed": False,
    },
    pinned={"tie_word_embeddings": False},
    # transformers writes the number of key-value heads a second time.
    inert=("emb_pdrop", "num_key_value_heads", "output_router_logits", "router_aux_loss_coef"),
)

_LAYER = "transformer.blocks.{i}"
_ATTENTION, _EXPERTS = f"{_LAYER}.norm_attn_norm", f"{_LAYER}.ffn.experts.mlp"

_BLOCKS: Rules = (
    *norm_rules(f"{_ATTENTION}.norm_1", f"{BLOCK}.ln1"),
    *fused_qkv_rules(f"{_ATTENTION}.attn.Wqkv", order="blocked"),
    *out_rules(f"{_ATTENTION}.attn.out_proj"),
    *norm_rules(f"{_ATTENTION}.norm_2", f"{BLOCK}.ln2"),
    *router_rules(f"{_LAYER}.ffn.router.layer"),
    Copy(f"{_EXPERTS}.w1", f"{BLOCK}.mlp.W_gate", "(e f) m -> e m f", part="moe"),
    Copy(f"{_EXPERTS}.v1", f"{BLOCK}.mlp.W_in", "(e f) m -> e m f", part="moe"),
    Copy(f"{_EXPERTS}.w2", f"{BLOCK}.mlp.W_out", "(e f) m -> e f m", part="moe"),
)

FAMILY = Family(
    name="dbrx",
    model_types=("dbrx",),
    architectures=("DbrxForCausalLM", "DbrxModel"),
    base_prefix="transformer.",
    embedding="transformer.wte.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=decoder_rules(_BLOCKS, embed="transformer.wte", final_norm="transformer.norm_f"),
    dialects={"dbrx": _lift_base},
)
