"""The parts of networks, as TransformerLens 2.x lays them out."""

import sys
from typing import Any, NoReturn

from hooklens.compat.transformer_lens.components import _mlps, _parts
from hooklens.compat.transformer_lens.components._mlps import MLP, CanBeUsedAsMLP, GatedMLP, MoE
from hooklens.compat.transformer_lens.components._parts import (
    AbstractAttention,
    Attention,
    Embed,
    GroupedQueryAttention,
    LayerNorm,
    LayerNormPre,
    PosEmbed,
    RMSNorm,
    RMSNormPre,
    TransformerBlock,
    Unembed,
    adopt,
    state_of,
)

# There each part is in a module of its own.
_PARTS = (
    "abstract_attention", "attention", "embed", "grouped_query_attention", "layer_norm", "layer_norm_pre", "pos_embed",
    "rms_norm", "rms_norm_pre", "transformer_block", "unembed",
)  # fmt: skip
_MLPS = ("mlps", "mlps.can_be_used_as_mlp", "mlps.gated_mlp", "mlps.mlp", "mlps.moe")
_ENCODERS = (
    "BertBlock", "BertEmbed", "BertMLMHead", "BertNSPHead", "BertPooler", "T5Attention", "T5Block", "TokenTypeEmbed",
)  # fmt: skip
sys.modules |= {f"{__name__}.{name}": _parts if name in _PARTS else _mlps for name in (*_PARTS, *_MLPS)}
mlps = _mlps


class _OfEncoders:
    """A part of encoders."""

    def __init__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(
            f"{type(self).__name__}: HookLens builds decoders, and parts of encoders are not here"
        )


BertBlock, BertEmbed, BertMLMHead, BertNSPHead, BertPooler, T5Attention, T5Block, TokenTypeEmbed = (
    type(name, (_OfEncoders,), {"__module__": __name__}) for name in _ENCODERS
)

__all__ = [
    "MLP", "AbstractAttention", "Attention", "BertBlock", "BertEmbed", "BertMLMHead", "BertNSPHead", "BertPooler",
    "CanBeUsedAsMLP", "Embed", "GatedMLP", "GroupedQueryAttention", "LayerNorm", "LayerNormPre", "MoE", "PosEmbed",
    "RMSNorm", "RMSNormPre", "T5Attention", "T5Block", "TokenTypeEmbed", "TransformerBlock", "Unembed", "adopt",
    "state_of",
]  # fmt: skip
