"""Config parts for norms: the key of their epsilon, which says what kind a family has, and those of queries, keys."""

from hooklens.adapters.keys.parts import Derived, Key
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


QK_NORM = Derived(lambda fields: {"qk_norm": fields["norm"]})
"""Queries and keys have norms like those of the branches, each head by itself. Comes after `norm_key`."""
