"""Config parts for latent attention, in DeepSeek's words, and for the mixtures that stand beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hooklens.adapters.keys.mixtures import MixtureKeys
from hooklens.adapters.keys.parts import Computed, ConfigPart, Key
from hooklens.adapters.keys.positions import PositionKeys
from hooklens.adapters.keys.reader import ConfigReader
from hooklens.config import MLAConfig, RotaryLayout, RotaryPositions, RotaryScaling
from hooklens.config.latent import find_latent

_RANK, _MSCALE = "q_lora_rank", "mscale_all_dim"
_WIDTHS = {
    "kv_lora_rank": "kv_rank",
    "qk_nope_head_dim": "d_nope",
    "qk_rope_head_dim": "d_rope",
    "v_head_dim": "d_head_v",
}
# What transformers derives anew from the widths, whatever a config says.
_DERIVED = ("head_dim", "qk_head_dim")
_KV_HEADS = "num_key_value_heads"
_FIRST_SPARSE = "first_k_dense_replace"


@dataclass(frozen=True, kw_only=True)
class LatentKeys:
    """Latent attention: `attn`, `d_head`, and biases. Comes after the sizes.

    A bias (`attention_bias`) is on what reads the stream but queries without a latent, and on the output. Every head
    has keys of its own: transformers cannot run fewer key-value heads, and takes more, its own default among them, for
    as many.
    """

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        return (_RANK, *_WIDTHS, *_DERIVED, "attention_bias", _KV_HEADS)

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read the fields; the rank of queries has to be there, null where they have no latent."""
        is_direct = reader.is_null(_RANK)
        widths: dict[str, Any] = {ours: reader.get(hub, int) for hub, ours in _WIDTHS.items()}
        q_rank = None if is_direct else reader.get(_RANK, int)
        biased = reader.get("attention_bias", bool, False)
        if reader.get(_KV_HEADS, int, fields.get("n_heads", 1)) < fields.get("n_heads", 1):
            reader.reject(_KV_HEADS, "as many as num_attention_heads")
        if reader.problems:
            return {}
        latent = MLAConfig(q_rank=q_rank, **widths)
        return {
            "attn": latent,
            "d_head": latent.d_head,
            "n_kv_heads": fields["n_heads"],
            "qkv_bias": biased,
            "q_bias": False if biased and is_direct else None,
            "out_bias": biased,
        }

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the widths; another attention differs from what is read back, and is refused there."""
        latent = find_latent(fields["attn"])
        if latent is None:
            return {_RANK: None, **dict.fromkeys(_WIDTHS, 2)}
        widths = {hub: getattr(latent, ours) for hub, ours in _WIDTHS.items()}
        return {
            _RANK: latent.q_rank,
            **widths,
            "attention_bias": fields["out_bias"],
            _KV_HEADS: fields["n_heads"],
        }


@dataclass(frozen=True, kw_only=True)
class LatentPositionKeys:
    """The rotation of latent attention, and the factor on scores that YaRN brings: `positions`, `n_ctx`, `attn_scale`.

    With YaRN and `mscale_all_dim`, scores are multiplied by `(0.1 mscale_all_dim ln(factor) + 1)^2`. Comes after
    `LatentKeys`.

    Attributes:
        rotary: how the rotation is read.
        interleave: the flag for pairs that stand side by side, True where it is absent; None: they always do.
    """

    rotary: PositionKeys
    interleave: str | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys the part reads."""
        return (*self.rotary.keys, *(() if self.interleave is None else (self.interleave,)))

    def read(self, reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Read the fields."""
        latent = find_latent(fields.get("attn"))
        side_by_side = self.interleave is None or reader.get(self.interleave, bool, True)
        if latent is None:
            return {}
        rope = self.rotary.open_rope(reader)
        n_ctx = reader.get(self.rotary.n_ctx, int, self.rotary.default_n_ctx)
        positions, n_ctx = self.rotary.read_rotary(reader, rope, {**fields, "d_head": latent.d_rope}, n_ctx=n_ctx)
        scaling = None if positions is None else positions.scaling
        rope.used.update((_MSCALE, "mscale"))
        if scaling is not None and scaling.kind != "yarn" and rope.get(_MSCALE, float, 0.0):
            rope.reject(_MSCALE, "none, but with 'yarn'")
        if positions is None or reader.problems:
            return {}
        layout: RotaryLayout = "interleaved" if side_by_side else "half"
        turns = RotaryPositions(dim=positions.dim, base=positions.base, layout=layout, scaling=scaling)
        return {"positions": turns, "n_ctx": n_ctx, "attn_scale": _score_scale(latent, scaling)}

    def write(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Write the rotation; a factor on scores that does not follow differs from what is read back."""
        positions = fields["positions"]
        is_half = isinstance(positions, RotaryPositions) and positions.layout == "half"
        layout = {} if self.interleave is None else {self.interleave: not is_half}
        return {**self.rotary.write(fields), **layout}


def _score_scale(latent: MLAConfig, scaling: RotaryScaling | None) -> float | None:
    """The factor on scores where it is not that of the width."""
    if scaling is None or not scaling.mscale_all_dim or scaling.factor <= 1:
        return None
    grown: float = 0.1 * scaling.mscale_all_dim * math.log(scaling.factor) + 1.0
    scale: float = latent.d_head**-0.5 * grown * grown
    return scale


def gate_scale_key(*, default: float) -> Key:
    """The factor on gates, 1 for none; `default` is what transformers takes where it is absent."""
    return Key(
        "routed_scaling_factor",
        "gate_scale",
        float,
        default=default,
        decode=lambda factor: None if factor == 1 else factor,
        encode=lambda factor: 1.0 if factor is None else factor,
    )


def _read_shared(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
    n_shared = reader.get("n_shared_experts", int)
    return {"d_shared": n_shared * fields["d_expert"] or None}


def _write_shared(fields: Mapping[str, Any]) -> dict[str, Any]:
    # A width that is no multiple differs from what is read back, and is refused there.
    return {"n_shared_experts": (fields["d_shared"] or 0) // fields["d_expert"]}


def late_mixture_keys(*options: ConfigPart, n_dense: int, experts: str, **fixed: Any) -> MixtureKeys:
    """DeepSeek's mixtures: in all layers but the first ones, and shared experts as wide as several of the others.

    Args:
        *options: further parts that read and write fields of `MoEConfig`.
        n_dense: how many layers are dense where the config is silent.
        experts: another spelling of the key for the number of experts.
        **fixed: fields of `MoEConfig` that are the same in every checkpoint of the family.
    """

    def read(reader: ConfigReader, n_layers: int) -> Sequence[bool]:
        first = reader.get(_FIRST_SPARSE, int, n_dense)
        return [layer >= first for layer in range(n_layers)]

    def write(is_sparse: Sequence[bool]) -> dict[str, Any]:
        return {_FIRST_SPARSE: next((layer for layer, sparse in enumerate(is_sparse) if sparse), len(is_sparse))}

    return MixtureKeys(
        options=(
            Key("n_routed_experts", "n_experts", int, alias=experts),
            Key("num_experts_per_tok", "experts_per_token", int),
            Key("moe_intermediate_size", "d_expert", int),
            Computed(("n_shared_experts",), _read_shared, _write_shared),
            *options,
        ),
        fixed={"router_float32": True, **fixed},
        sparse=read,
        sparse_keys=(_FIRST_SPARSE,),
        write_sparse=write,
    )
