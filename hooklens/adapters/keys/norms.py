"""Config parts for norms: the key of their epsilon, which says what kind a family has, and flags for further ones."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hooklens.adapters.keys.parts import Computed, Derived, Key
from hooklens.adapters.keys.reader import ConfigReader
from hooklens.config import NormConfig, NormKind


def norm_key(
    hub: str,
    kind: NormKind,
    *,
    default_eps: float,
    weight: bool = True,
    bias: bool | None = None,
    unit_offset: bool = False,
    wide_weight: bool = False,
) -> Key:
    """The key of the norms' epsilon; the kind of norm is the family's.

    Args:
        hub: the key.
        kind: `"layer"` or `"rms"`.
        default_eps: what transformers takes where the key is absent.
        weight, bias, unit_offset, wide_weight: see `NormConfig`. A `bias` of None: LayerNorms have one.
    """
    has_bias = kind == "layer" if bias is None else bias

    def decode(eps: float) -> NormConfig:
        return NormConfig(
            kind=kind, eps=eps, weight=weight, bias=has_bias, unit_offset=unit_offset, wide_weight=wide_weight
        )

    def encode(norm: object) -> float:
        # What is no norm, or one for each layer, differs from what is read back, and is refused there.
        return norm.eps if isinstance(norm, NormConfig) else default_eps

    return Key(hub, "norm", float, default=default_eps, decode=decode, encode=encode)


def qk_norm_flag(
    hub: str = "qk_layernorm", *, default: bool = False, bias: bool | None = None, per_head: bool = False
) -> Computed:
    """A flag that gives queries and keys norms of the block's kind: `qk_norm`. Comes after the part that gives `norm`.

    Args:
        hub: the key.
        default: what transformers takes where the key is absent.
        bias: whether these norms have a bias; None: as the block's have.
        per_head: whether each head has a weight of its own.
    """

    def read(reader: ConfigReader, fields: Mapping[str, Any]) -> dict[str, Any]:
        norm = fields.get("norm")
        if not reader.get(hub, bool, default) or not isinstance(norm, NormConfig):
            return {"qk_norm": None}
        return {"qk_norm": norm if bias is None else replace(norm, bias=bias), "qk_norm_per_head": per_head}

    def write(fields: Mapping[str, Any]) -> dict[str, Any]:
        # Norms of another kind than the block's differ from what is read back, and are refused there.
        return {hub: fields["qk_norm"] is not None}

    return Computed((hub,), read, write)


QK_NORM = Derived(lambda fields: {"qk_norm": fields["norm"]})
"""Queries and keys have norms like those of the branches, each head by itself. Comes after `norm_key`."""
