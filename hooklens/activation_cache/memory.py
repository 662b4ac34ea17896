"""Which tensors are one and the same, and taking part of an axis without a copy where a view can say it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


class Gathered(dict[str, Tensor]):
    """Activations of several devices, each brought to one of them as it is read.

    Args:
        tensors: by name.
        device: where they come together.
    """

    def __init__(self, tensors: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__(tensors)
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        return super().__getitem__(name).to(self._device)


def identify(tensor: Tensor) -> tuple[object, ...]:
    """A key that is equal for two tensor objects exactly if they are the same elements of the same memory.

    `detach()` makes another object of the same tensor, so `id` would miss aliases. A tensor with an autograd
    history is not the same as one without.
    """
    if not tensor.numel() or not tensor.data_ptr():
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad)


def count_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of memory that tensors keep alive; memory that several of them share counts once."""
    storages = {}
    for index, tensor in enumerate(tensors.values()):
        storage = tensor.untyped_storage()
        # Tensors without data (on the meta device) all have address 0.
        storages[tensor.device, storage.data_ptr() or -1 - index] = storage.nbytes()
    return sum(storages.values())


def take(tensor: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    """The entries of an axis: a view where the indices are evenly spaced and ascend, else a copy."""
    if len(indices) == tensor.shape[axis] and list(indices) == list(range(len(indices))):
        return tensor
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    evenly = len(indices) > 0 and step > 0 and all(later - earlier == step for earlier, later in pairwise(indices))
    if evenly:
        place: list[Any] = [slice(None)] * tensor.ndim
        place[axis] = slice(indices[0], indices[-1] + 1, step)
        return tensor[tuple(place)]
    return tensor.index_select(axis, torch.tensor(indices, dtype=torch.long, device=tensor.device))
