"""LoRA adapters of PEFT, read from their folders and held against the checkpoint that they change."""

from hooklens.adapters.lora.adapter import LoraAdapter, LoraModule, open_adapter, open_base, read_adapter, read_files
from hooklens.adapters.lora.binding import BoundAdapter, LowRankChange, bind_adapter
from hooklens.adapters.lora.live import take_adapters
from hooklens.adapters.lora.merged import MergedTensors
from hooklens.adapters.lora.settings import LoraSettings, read_settings

__all__ = [
    "BoundAdapter",
    "LoraAdapter",
    "LoraModule",
    "LoraSettings",
    "LowRankChange",
    "MergedTensors",
    "bind_adapter",
    "open_adapter",
    "open_base",
    "read_adapter",
    "read_files",
    "read_settings",
    "take_adapters",
]
