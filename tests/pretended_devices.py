"""Several devices on a machine that has none: tensors on the CPU that say they lie elsewhere.

`torch` knows a device type `"lazy"` that needs no hardware and serves nothing by itself. Inside `pretending()` tensors
can be made on and brought to `"lazy:0"`, `"lazy:1"` and so on. What is asked of them is computed on the CPU, with the
same numbers, and refused as CUDA refuses it where tensors of several devices meet (a tensor on the CPU without axes may
stand beside any). So every crossing from a device to another is seen.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from hooklens.weights.offloaded import OffloadedTensor

KIND = "lazy"
FIRST, SECOND, THIRD = (torch.device(KIND, number) for number in range(3))
_MOVING = frozenset({"aten::copy_", "aten::_to_copy"})


class PretendedTensor(Tensor):
    """A tensor that says it lies on a device, over one on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held, device):
        return Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )

    def __init__(self, held, device):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return NotImplemented if _is_elsewhere(types) else _run(func, args, kwargs or {})

    def __repr__(self):
        return f"{self.held!r} on {self.device}"

    # What PyTorch gives of no subclass.
    def tolist(self):
        return self.held.tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()


def _is_elsewhere(types):
    """Whether a tensor lies elsewhere than it computes, which brings itself to its device first."""
    return any(issubclass(kind, OffloadedTensor) for kind in types)


def _run(func, args, kwargs):
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    devices = {one.device for one in given if one.ndim or one.device.type != "cpu"}
    if len(devices) > 1 and func._schema.name not in _MOVING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(map(str, devices)))}! (in {func._schema.name})"
        )
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
    elif func._schema.name == "aten::copy_":
        device = args[0].device
    else:
        device = next(iter(devices), torch.device("cpu"))
    outer = {id(one.held): one for one in given if isinstance(one, PretendedTensor)}
    args, kwargs = tree_map(lambda x: x.held if isinstance(x, PretendedTensor) else x, (args, kwargs))
    if device.type == KIND and kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
        if func._schema.name == "aten::_to_copy":
            kwargs["non_blocking"] = False
    result = func(*args, **kwargs)
    if device.type != KIND:
        return result

    def wrap(leaf):
        if not isinstance(leaf, Tensor):
            return leaf
        # What was changed in place is the tensor that was given.
        return outer[id(leaf)] if id(leaf) in outer else PretendedTensor(leaf, device)

    return tree_map(wrap, result)


class _Pretending(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls):
        # Its import takes seconds, and nothing is compiled here.
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return NotImplemented if _is_elsewhere(types) else _run(func, args, kwargs or {})


@contextmanager
def pretending() -> Iterator[None]:
    """A block in which tensors can be made on the devices."""
    before = torch._C._only_lift_cpu_tensors(), torch.is_autocast_enabled
    # Where gradient checkpointing looks for the state of a device's random numbers.
    setattr(torch, KIND, SimpleNamespace(_initialized=False))
    # `torch.tensor` makes its tensor on the CPU and brings it to the device where the mode sees it.
    torch._C._set_only_lift_cpu_tensors(True)
    # It knows no such device type, instead of being off there.
    torch.is_autocast_enabled = lambda *kind: kind != (KIND,) and before[1](*kind)
    try:
        with _Pretending():
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before[0])
        torch.is_autocast_enabled = before[1]
        delattr(torch, KIND)
