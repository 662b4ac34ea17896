"""The parts of networks, as TransformerLens 2.x lays them out."""

import sys
from typing import Any

from hooklens.compat.transformer_lens._absent import Absent
from hooklens.compat.transformer_lens.components import _attention, _mlps, _parts
from hooklens.compat.transformer_lens.components._attention import AbstractAttention, Attention, GroupedQueryAttention
from hooklens.compat.transformer_lens.components._mlps import MLP, CanBeUsedAsMLP, GatedMLP, MoE
from hooklens.compat.transformer_lens.components._parts import (
    Embed,
    LayerNorm,
    LayerNormPre,
    PosEmbed,
    RMSNorm,
    RMSNormPre,
    TransformerBlock,
    Unembed,
    adopt,
    parameter_names,
    state_of,
)

# There each part is in a module of its own.
_MODULES: dict[Any, tuple[str, ...]] = {
    _attention: ("abstract_attention", "attention", "grouped_query_attention"),
    _mlps: ("mlps", "mlps.can_be_used_as_mlp", "mlps.gated_mlp", "mlps.mlp", "mlps.moe"),
    _parts: (
        "embed", "layer_norm", "layer_norm_pre", "pos_embed", "rms_norm", "rms_norm_pre", "transformer_block",
        "unembed",
    ),
}  # fmt: skip
_ENCODERS = {
    "BertBlock": "bert_block", "BertEmbed": "bert_embed", "BertMLMHead": "bert_mlm_head",
    "BertNSPHead": "bert_nsp_head", "BertPooler": "bert_pooler", "T5Attention": "t5_attention", "T5Block": "t5_block",
    "TokenTypeEmbed": "token_typed_embed",
}  # fmt: skip
_MODULES[sys.modules[__name__]] = tuple(_ENCODERS.values())
sys.modules |= {f"{__name__}.{name}": module for module, names in _MODULES.items() for name in names}
mlps = _mlps


BertBlock, BertEmbed, BertMLMHead, BertNSPHead, BertPooler, T5Attention, T5Block, TokenTypeEmbed = (
    type(name, (Absent,), {"__module__": __name__}) for name in _ENCODERS
)

__all__ = [
    "MLP", "AbstractAttention", "Attention", "BertBlock", "BertEmbed", "BertMLMHead", "BertNSPHead", "BertPooler",
    "CanBeUsedAsMLP", "Embed", "GatedMLP", "GroupedQueryAttention", "LayerNorm", "LayerNormPre", "MoE", "PosEmbed",
    "RMSNorm", "RMSNormPre", "T5Attention", "T5Block", "TokenTypeEmbed", "TransformerBlock", "Unembed", "adopt",
    "parameter_names", "state_of",
]  # fmt: skip
