"""Which device 2.x puts a model or a block on."""

from typing import Any

import torch

AvailableDeviceMemory = list[tuple[int, int]]
"""GPUs by number, each with the bytes that are free of it."""


def calculate_available_device_cuda_memory(i: int) -> int:
    """The bytes of a GPU that this process has not allocated."""
    return int(torch.cuda.get_device_properties(i).total_memory) - torch.cuda.memory_allocated(i)


def determine_available_memory_for_available_devices(max_devices: int) -> AvailableDeviceMemory:
    """The first GPUs with their memory."""
    return [(number, calculate_available_device_cuda_memory(number)) for number in range(max_devices)]


def sort_devices_based_on_available_memory(devices: AvailableDeviceMemory) -> AvailableDeviceMemory:
    """Those with most memory first."""
    return sorted(devices, key=lambda device: device[1], reverse=True)


def get_best_available_cuda_device(max_devices: int | None = None) -> torch.device:
    """The GPU with most memory."""
    count = torch.cuda.device_count() if max_devices is None else max_devices
    devices = sort_devices_based_on_available_memory(determine_available_memory_for_available_devices(count))
    if not devices:
        raise OSError("the config asks for CUDA, and there is no GPU")
    return torch.device("cuda", devices[0][0])


def get_best_available_device(cfg: Any) -> torch.device:
    """The device of a config; of several GPUs the one with most memory."""
    device = torch.device(cfg.device)
    return get_best_available_cuda_device(cfg.n_devices) if device.type == "cuda" and cfg.n_devices > 1 else device


def get_device_for_block_index(index: int, cfg: Any, device: torch.device | str | None = None) -> torch.device:
    """The device of a block: each of a model's GPUs has as many blocks, counted from that of the model."""
    first = torch.device(cfg.device if device is None else device)
    if first.type == "cpu" or cfg.n_devices == 1:
        return first
    number = (first.index or 0) + index // (cfg.n_layers // cfg.n_devices)
    return torch.device(first.type, number)


def move_to_and_update_config(model: Any, device_or_dtype: Any, print_details: bool = True) -> Any:
    """`model.to`, which says so in its config."""
    return model.to(device_or_dtype, print_details=print_details)
