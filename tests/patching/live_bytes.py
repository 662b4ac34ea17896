"""A count of the bytes that tensors hold while something runs."""

import weakref

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations give back, until nothing refers to them.

    Attributes:
        peak: the most bytes that were held at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held: set[int] = set()
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.held:
                    self.held.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _forget(self, storage: int, n_bytes: int) -> None:
        self.held.discard(storage)
        self.now -= n_bytes
