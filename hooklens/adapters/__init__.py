"""Checkpoints of the supported families, converted into HookLens' layout and back.

A family is one declarative file in `families/`, or a `Family` of another package, read in both directions. Nothing here
knows a network: what comes out is a `HookedConfig` and tensors under HookLens names.
"""

from hooklens.adapters.checkpoint import Checkpoint, download_checkpoint, open_checkpoint, open_config
from hooklens.adapters.export import write_checkpoint
from hooklens.adapters.family import Family
from hooklens.adapters.hf_model import build_hf_model, choose_attention, read_hf_generation_config, read_hf_model
from hooklens.adapters.kept import Kept, QuantisedWeight
from hooklens.adapters.late import open_adapter, read_xlstm, write_xlstm
from hooklens.adapters.layout import to_hub
from hooklens.adapters.sources import Repository

__all__ = [
    "Checkpoint",
    "Family",
    "Kept",
    "QuantisedWeight",
    "Repository",
    "build_hf_model",
    "choose_attention",
    "download_checkpoint",
    "open_adapter",
    "open_checkpoint",
    "open_config",
    "read_hf_generation_config",
    "read_hf_model",
    "read_xlstm",
    "to_hub",
    "write_checkpoint",
    "write_xlstm",
]
