"""Tensors from one process of a group to the others, each behind a word on what it is."""

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

FIRED, GRADIENT, DONE, FAILED = range(4)
"""What a message brings: what passes a hook point, a gradient there, what a stage gives; or that it broke off."""

_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_MOST_AXES = 8


class Wire:
    """Messages within a group of processes, which all of them read in the order in which they were sent.

    Args:
        mesh: the processes, of one dimension.
        device: where tensors lie.
    """

    def __init__(self, mesh: DeviceMesh, device: torch.device) -> None:
        self._group, self._device = mesh.get_group(), device
        self._ranks = distributed.get_process_group_ranks(self._group)

    def send(self, sender: int, kind: int, number: int = 0, tensor: Tensor | None = None) -> None:
        """Tell all others; `sender` is this process's place in the group."""
        shape = () if tensor is None else tensor.shape
        dtype = 0 if tensor is None else 1 + _DTYPES.index(tensor.dtype)
        words = [kind, number, dtype, len(shape), *shape]
        words += [0] * (4 + _MOST_AXES - len(words))
        distributed.broadcast(torch.tensor(words, device=self._device), self._ranks[sender], group=self._group)
        if tensor is not None:
            distributed.broadcast(tensor.detach().contiguous(), self._ranks[sender], group=self._group)

    def receive(self, sender: int) -> tuple[int, int, Tensor | None]:
        """The next message of a process: its kind, its number, and the tensor with it."""
        words = torch.empty(4 + _MOST_AXES, dtype=torch.int64, device=self._device)
        distributed.broadcast(words, self._ranks[sender], group=self._group)
        kind, number, dtype, n_axes, *sizes = words.tolist()
        if not dtype:
            return kind, number, None
        tensor = torch.empty(sizes[:n_axes], dtype=_DTYPES[dtype - 1], device=self._device)
        distributed.broadcast(tensor, self._ranks[sender], group=self._group)
        return kind, number, tensor
