"""Copies of models that share the original's memory until one of the two is written to.

PyTorch copies a tensor lazily (`Tensor._lazy_clone`): both have one memory, and the first write to either gives that
one a memory of its own, as forked processes share theirs. Reading a model, running and training it are what they always
are. What asks for the address of a weight (`data_ptr`, `numpy()`, safetensors' writer) counts as a write.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def copy_with(model: Model, make: Callable[[Tensor], Tensor]) -> Model:
    """A copy of a model, with its hooks, in which each parameter is made of the original's.

    Args:
        model: any module. It is not changed.
        make: gives the tensor of a parameter from that of the original. Parameters of other kinds, such as quantised
            ones, are copied as they copy themselves.
    """
    memo: dict[int, Any] = {}
    with torch.inference_mode(mode=False), torch.no_grad():
        for parameter in model.parameters():
            if type(parameter) is nn.Parameter:
                made = nn.Parameter(make(parameter.detach()), requires_grad=parameter.requires_grad)
                memo[id(parameter)] = made
        return copy.deepcopy(model, memo)


def copy_on_write(model: Model) -> Model:
    """A copy of a model that shares the memory of its parameters until one of the two is written to.

    A parameter of which PyTorch cannot share the memory so, because it is mapped from a file, is copied at once.
    """
    return copy_with(model, clone_lazily)


def clone_lazily(tensor: Tensor) -> Tensor:
    """A copy that shares memory until one of the two is written to; copied at once where PyTorch cannot share it."""
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        return tensor._lazy_clone()
    return tensor.clone()


class KeptModels:
    """The models that were loaded last, each with its weights in memory that copies can share.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._models: OrderedDict[Hashable, nn.Module] = OrderedDict()

    def __len__(self) -> int:
        return len(self._models)

    def get(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """A model: a copy of the one that is kept, which is loaded where none is.

        Args:
            key: what was asked for, in all that says which weights they are.
            load: loads it.
        """
        kept = self._models.get(key)
        if kept is None:
            # Room is made first: no more than `most` are held while one is loaded.
            while len(self._models) >= self._most:
                self._models.popitem(last=False)
            kept = load()
            self._share(kept, list(self._models.values()))
            self._models[key] = kept
        self._models.move_to_end(key)
        return copy_on_write(kept)

    def _share(self, model: nn.Module, others: Iterable[nn.Module]) -> None:
        """Put a model's weights where copies can share them: those equal to another model's share its memory."""
        held = [dict(other.named_parameters()) for other in others]
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, parameter in model.named_parameters():
                if type(parameter) is not nn.Parameter:
                    continue
                twins = (one[name] for one in held if name in one)
                equal = next((twin for twin in twins if _are_equal(parameter, twin)), None)
                parameter.data = clone_lazily(parameter.detach() if equal is None else equal.detach())


def _are_equal(one: Tensor, other: Tensor) -> bool:
    if type(other) is not nn.Parameter or (one.shape, one.dtype, one.device) != (
        other.shape,
        other.dtype,
        other.device,
    ):
        return False
    # Bits, since numbers would not tell 0 from -0, and no NaN equals itself.
    bits = _BITS[one.element_size()]
    return one.is_contiguous() and other.is_contiguous() and torch.equal(one.view(bits), other.view(bits))
