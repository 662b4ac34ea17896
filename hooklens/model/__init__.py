"""The network: no family names, no files, no tokenizer.

The kinds of parts that a config can ask for are known once their modules are imported, which happens here.
"""

from hooklens.model.attention.attention import Attention
from hooklens.model.decoder import Decoder
from hooklens.model.mlp import MLP
from hooklens.model.moe import MoE
from hooklens.model.parts.declared import When, inner, point, weight
from hooklens.model.parts.part import Part

__all__ = ["MLP", "Attention", "Decoder", "MoE", "Part", "When", "inner", "point", "weight"]
