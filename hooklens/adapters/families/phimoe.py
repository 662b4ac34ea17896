"""Phi-3.5-MoE (Abdin et al. 2024, "Phi-3 Technical Report"; Liu et al. 2024, "GRIN: GRadient-INformed MoE").

Checkpoints: microsoft/Phi-3.5-MoE-instruct, microsoft/Phi-mini-MoE-instruct, Phi-tiny-MoE-instruct, whose `model_type`
is `phimoe`.

Peculiarities:
- Mixtral's names, but LayerNorms with biases (the key is `rms_norm_eps` all the same), biases in attention where
  `attention_bias` says so, and in the unembedding where `lm_head_bias` does.
- Two experts see a token, each with a softmax of its own over the experts whose logits are near its own (the
  sparsemixer); how near is `router_jitter_noise`, which therefore is no noise and acts outside of training, too.
- Longrope as transformers 5 computes it: `short_factor` at every length, and cosines and sines times `short_mscale`, or
  `long_mscale` where the sequence is longer than the original length. Published configs have the same in both; others
  are refused. (The released code takes `long_factor` there.)
- `intermediate_size` is the width of an expert, of which `w1` is the gate, `w3` the linear half and `w2` the way out.
- The rotary base is a million where the config is silent.
- transformers 5 holds experts stacked and calls `block_sparse_moe.gate` `mlp.router` in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hooklens.adapters.family import Family
from hooklens.adapters.keys import (
    INERT_ROUTER_KEYS,
    SIZE_KEYS,
    ActivationKey,
    BiasFlag,
    ConfigMap,
    ConfigReader,
    Key,
    MixtureKeys,
    PositionKeys,
    WindowKeys,
    norm_key,
)
from hooklens.adapters.tables import expert_rules, llama_rules, router_rules, stacked_expert_rules
from hooklens.config import RotaryPositions

_MSCALES = ("short_mscale", "long_mscale")


@dataclass(frozen=True, kw_only=True)
class ShortLongrope(PositionKeys):
    """Rotary whose longrope takes the factors of short sequences at every length."""

    def read_rotary(
        self, reader: ConfigReader, rope: ConfigReader, fields: Mapping[str, Any], *, n_ctx: int
    ) -> tuple[RotaryPositions | None, int]:
        """Read the rotation; the factors of long sequences count for nothing."""
        positions, n_ctx = super().read_rotary(reader, rope, fields, n_ctx=n_ctx)
        if positions is None or positions.scaling is None:
            return positions, n_ctx
        if positions.scaling.kind != "longrope":
            rope.reject("rope_type" if rope.has("rope_type") else "type", "'default' or 'longrope'")
        rope.used.add("attention_factor")
        short, long = (rope.get(key, float) for key in _MSCALES)
        if short != long:
            rope.reject("long_mscale", f"{short}, the value of short_mscale: two that differ are not implemented")
        if reader.problems:
            return None, n_ctx
        scaling = replace(
            positions.scaling, long_factors=positions.scaling.short_factors, attention_factor=float(short)
        )
        return replace(positions, scaling=scaling), n_ctx

    def write_rotary(self, positions: RotaryPositions, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the rotation."""
        written = super().write_rotary(positions, fields)
        if positions.scaling is None:
            return written
        # What has no such factor, or other ones for long sequences, differs from what is read back.
        return {**written, **dict.fromkeys(_MSCALES, positions.scaling.attention_factor or 1.0)}


_CONFIG = ConfigMap(
    parts=(
        *SIZE_KEYS,
        Key("num_key_value_heads", "n_kv_heads", int),
        Key("head_dim", "d_head", int, default=None),
        ActivationKey("hidden_act", default="silu"),
        norm_key("rms_norm_eps", "layer", default_eps=1e-5),
        BiasFlag("attention_bias", ("qkv_bias", "out_bias"), default=False),
        Key("lm_head_bias", "unembed_bias", bool, default=False),
        Key("tie_word_embeddings", "tied_unembed", bool, default=False),
        Key("initializer_range", "init_std", float, default=0.02),
        ShortLongrope(default_n_ctx=131072, default_base=1e6),
        WindowKeys(typed=False),
        MixtureKeys(
            options=(
                Key("num_local_experts", "n_experts", int),
                Key("num_experts_per_tok", "experts_per_token", int),
                Key("intermediate_size", "d_expert", int),
                Key("router_jitter_noise", "sparsemixer_eps", float, default=0.01),
            ),
            fixed={"router": "sparsemixer"},
        ),
    ),
    fixed={"gated_mlp": True, "mlp_bias": False},
    inert=(*INERT_ROUTER_KEYS, "input_jitter_noise"),
)

_LAYER = "model.layers.{i}"
_MIXTURE = f"{_LAYER}.block_sparse_moe"

FAMILY = Family(
    name="phimoe",
    model_types=("phimoe",),
    architectures=("PhimoeForCausalLM", "PhiMoEForCausalLM", "PhimoeModel"),
    base_prefix="model.",
    embedding="model.embed_tokens.weight",
    head="lm_head.weight",
    config=_CONFIG,
    weights=llama_rules(
        mlp=(
            *router_rules(f"{_MIXTURE}.gate"),
            *expert_rules(f"{_MIXTURE}.experts.{{e}}", gate="w1", up="w3", down="w2"),
        )
    ),
    in_memory=(*router_rules(f"{_LAYER}.mlp.router"), *stacked_expert_rules(f"{_LAYER}.mlp.experts")),
)
