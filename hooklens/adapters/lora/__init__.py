"""LoRA adapters of PEFT, read from their folders and held against the checkpoint that they change."""

from hooklens.adapters.lora.adapter import LoraAdapter, LoraModule, open_adapter, read_adapter
from hooklens.adapters.lora.binding import BoundAdapter, LowRankChange, bind_adapter
from hooklens.adapters.lora.settings import LoraSettings, read_settings

__all__ = [
    "BoundAdapter",
    "LoraAdapter",
    "LoraModule",
    "LoraSettings",
    "LowRankChange",
    "bind_adapter",
    "open_adapter",
    "read_adapter",
    "read_settings",
]
