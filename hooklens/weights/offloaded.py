"""Weights that lie elsewhere than where they compute: on the disk, or in the CPU's memory for an accelerator.

An `OffloadedTensor` says the device that it computes on, and holds its values on the CPU: in memory, or in the mapping
of a file, whose pages the system reads when they are touched and gives back when memory is short. Each operator that
reads it brings it to its device first and lets go of that copy behind it, in a backward pass, too: autograd keeps the
tensor itself. Where it computes on the CPU nothing is copied.

It cannot be changed. So copies of a model share it, threads can use it at once, and a file is written once.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._utils import _rebuild_parameter
from torch.utils._pytree import tree_map_only

from hooklens.errors import HookLensError, InputError

Lies = Literal["cpu", "disk"]
_CPU = torch.device("cpu")
_WORDS = {"cpu": "in the CPU's memory (offloaded)", "disk": "on the disk (offloaded)"}
_WAY_OUT = "load the model with that part on a device (device_map=), or model.dispatch({...}) puts it on one"
_aten = torch.ops.aten


class OffloadedTensor(Tensor):
    """A tensor that holds its values on the CPU and computes on a device.

    Args:
        held: the values, on the CPU.
        device: where it computes.
        lies: what the values lie in.
    """

    held: Tensor
    lies: Lies

    @staticmethod
    def __new__(cls: type["OffloadedTensor"], held: Tensor, device: torch.device, lies: Lies) -> "OffloadedTensor":
        """A tensor without values of its own."""
        make: Any = Tensor._make_wrapper_subclass
        made: OffloadedTensor = make(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=device,
        )
        return made

    def __init__(self, held: Tensor, device: torch.device, lies: Lies) -> None:
        self.held, self.lies = held.detach(), lies

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator: on a view of what is held, or on values that were brought to the device."""
        kwargs = kwargs or {}
        _refuse_writes(func, args, kwargs)
        first = args[0] if args else None
        if isinstance(first, OffloadedTensor):
            if _is_view(func):
                found = func(first.held, *args[1:], **kwargs)
                return tree_map_only(Tensor, lambda view: OffloadedTensor(view, first.device, first.lies), found)
            if func is _aten._to_copy.default:
                return func(first.held, **{"device": first.device, **kwargs})
            if func is _aten.embedding.default and first.device != _CPU:
                # A few rows of a table need not bring all others with them.
                return func(first.held, args[1].cpu(), *args[2:], **kwargs).to(first.device)
        return func(*_bring(args), **_bring(kwargs))

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.device, Lies]]:
        """For `torch.compile`: what it is made of."""
        return ["held"], (self.device, self.lies)

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any) -> "OffloadedTensor":
        """For `torch.compile`: it, made anew."""
        return OffloadedTensor(inner["held"], *context)

    def bring(self) -> Tensor:
        """The values on the device: what is held itself on the CPU, else a copy."""
        return self.held.to(self.device)

    @property
    def requires_grad(self) -> bool:
        """Whether its gradient is recorded: never."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        requires_grad: bool = True,  # noqa: FBT001, FBT002
    ) -> "OffloadedTensor":
        """Leave it as it is.

        Raises:
            InputError: gradients are asked for.
        """
        if requires_grad:
            raise InputError(
                f"requires_grad: a weight lies {_WORDS[self.lies]} and is not trained; gradients of activations go "
                f"through it. To train it, {_WAY_OUT}"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "OffloadedTensor":
        """Another tensor over the same values, which nothing changes."""
        copied = OffloadedTensor(self.held, self.device, self.lies)
        if isinstance(self, nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle holds the values: what is read from it is an ordinary tensor on the device."""
        plain: Any = self.bring().clone()
        if isinstance(self, nn.Parameter):
            trains = plain.is_floating_point()
            return _rebuild_parameter, (plain, trains, OrderedDict())
        return plain.__reduce_ex__(protocol)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """The values, where they lie and where they compute."""
        return f"OffloadedTensor({self.held!r}, lies={self.lies!r}, device={str(self.device)!r})"

    # What PyTorch gives of no subclass without memory of its own. Its storage stays an empty one: `torch.compile` takes
    # what has values there for a view of them.
    def numpy(self, *, force: bool = False) -> Any:
        """The values as an array that cannot be written to."""
        array = self.held.numpy(force=force)
        array.flags.writeable = False
        return array

    def tolist(self) -> Any:
        """The values as numbers."""
        return self.held.tolist()

    def data_ptr(self) -> int:
        """The address of what is held."""
        return self.held.data_ptr()


def offload(tensor: Tensor, device: torch.device, lies: Lies) -> nn.Parameter:
    """A parameter of values that lie on the CPU, or in a mapped file, and compute on a device."""
    return nn.Parameter(OffloadedTensor(tensor, device, lies), requires_grad=False)


def is_offloaded(tensor: object) -> bool:
    """Whether a tensor lies elsewhere than it computes, or on the disk."""
    return isinstance(tensor, OffloadedTensor)


def values_of(tensor: Tensor) -> Tensor:
    """What an offloaded tensor holds, on the CPU, to be read only; another tensor itself."""
    return tensor.held if isinstance(tensor, OffloadedTensor) else tensor


def lies_on_disk(tensor: object) -> bool:
    """Whether a tensor lies in the mapping of a file."""
    return isinstance(tensor, OffloadedTensor) and tensor.lies == "disk"


def offloaded_parameters(network: nn.Module) -> Iterator[tuple[str, OffloadedTensor]]:
    """The offloaded parameters of a network, by name."""
    for name, parameter in network.named_parameters():
        held: object = parameter
        if isinstance(held, OffloadedTensor):
            yield name, held


def refuse_offloaded(network: nn.Module, what: str, error: type[HookLensError], *, otherwise: str) -> None:
    """Refuse what would bring all weights of a network into memory, or change them.

    Args:
        network: the network.
        what: is asked for, and why it cannot be done: the beginning of the text.
        error: the kind of error.
        otherwise: what to do.

    Raises:
        HookLensError: of that kind.
    """
    found = dict(offloaded_parameters(network))
    if found:
        name, first = next(iter(found.items()))
        raise error(f"{what} ({len(found)} weights are offloaded, {name!r} first, {_WORDS[first.lies]}); {otherwise}")


def explain_change(tensor: OffloadedTensor) -> str:
    """Why a weight is not changed, and what to do."""
    return f"the weight lies {_WORDS[tensor.lies]}, where it is read and not changed. To change it, {_WAY_OUT}"


def _bring(tree: Any) -> Any:
    return tree_map_only(OffloadedTensor, OffloadedTensor.bring, tree)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _refuse_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse an operator that would write to an offloaded tensor.

    Raises:
        InputError: it would.
    """
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = kwargs.get(argument.name) if argument.kwarg_only or place >= len(args) else args[place]
        for one in given if isinstance(given, list | tuple) else (given,):
            if isinstance(one, OffloadedTensor):
                raise InputError(f"{func._schema.name.removeprefix('aten::')}: {explain_change(one)}")
