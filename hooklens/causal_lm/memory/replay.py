"""A call run on tensors that have shapes and no values, with every byte that it would hold counted.

The model is copied, its weights replaced by tensors of torch's `FakeTensorMode`: these have a shape, a dtype and a
device, operators on them say what they would give, and nothing is computed or allocated. So any family and wiring is
counted by the code that computes it, and the time it takes grows with the operators of a call, not with their sizes.

Token ids, masks and positions keep their values where they are small, since the network decides by them. Values that
follow from activations are known to nobody before the call: whoever asks for one is refused. How many tokens an expert
of a mixture gets is such a value, too, and is taken to be the same for all: the results of all experts are held
together, so their sum counts.
"""

import copy
import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from hooklens.errors import HookLensError, InputError
from hooklens.weights.offloaded import OffloadedTensor, is_offloaded

Copied = TypeVar("Copied")

# Whole numbers and flags of up to so many entries have values: 8 MiB of int64.
_ALWAYS_WITH_VALUES = 2**20
# Numbers that code makes to try something out, such as whether a dtype can be converted.
_MOST_FLOATS = 16

# What a copy shares with its original, so nothing in it is looked for.
_SHARED_KINDS = (type, ModuleType, FunctionType, BuiltinFunctionType, weakref.ref, str, bytes, int, float, torch.dtype)


class Replay(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs what stands in its block without values, and counts what it holds.

    Every storage that an operator makes counts from then until it is freed; what existed before does not.

    Args:
        n_tokens: how many token ids there are, which have values.
        unknown: what stands for a value that nobody knows: None refuses who asks, 0 is 0 and False.

    Attributes:
        live: bytes held at the moment, by device.
        peak: the most bytes held at once, by device.
    """

    def __init__(self, n_tokens: int, *, unknown: Literal[0] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._unknown = unknown
        # Ids, masks and positions of past and new tokens have values, and what else is as small.
        self._most_with_values = max(_ALWAYS_WITH_VALUES, 4 * n_tokens)
        self.live: Counter[torch.device] = Counter()
        self.peak: Counter[torch.device] = Counter()
        self._shapes = FakeTensorMode()
        # By address of a storage that is held the place in the log where it was made; and what was made and freed.
        self._held: dict[int, int] = {}
        self._log: list[tuple[torch.device, int, int]] = []

    def copy(self, original: Copied, *, shared: Iterable[object] = ()) -> Copied:
        """A copy of objects, whose tensors have no values but for small ones of whole numbers and flags.

        Args:
            original: what is copied.
            shared: objects in it that the copy has, too.
        """
        memo: dict[int, Any] = {id(one): one for one in shared}
        for tensor in find_tensors(original, shared):
            if tensor.is_floating_point() or self._is_large(tensor) or is_offloaded(tensor):
                memo[id(tensor)] = self.without_values(tensor)
        copied: Copied = copy.deepcopy(original, memo)
        return copied

    def without_values(self, tensor: Tensor) -> Tensor:
        """A tensor of the same shape, dtype, device and layout in memory."""
        if isinstance(tensor, OffloadedTensor):
            with self._shapes:
                return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        return tensor if isinstance(tensor, FakeTensor) else self._shapes.from_tensor(tensor)

    def start_anew(self) -> None:
        """Let the peak count from here on."""
        self.peak = Counter(self.live)

    def find_held(self, tensors: Iterable[Tensor]) -> set[int]:
        """Which of the storages that were made, and are still held, some tensors lie in: their places in the log."""
        held = (self._held.get(one.untyped_storage()._cdata) for one in tensors)
        return {place for place in held if place is not None}

    @property
    def held(self) -> set[int]:
        """All storages that were made and are still held."""
        return set(self._held.values())

    def peak_if(self, shares: Mapping[int, float]) -> dict[torch.device, int]:
        """What the peaks would be if some storages were smaller.

        Args:
            shares: by storage the part of its size that is left.
        """
        live: Counter[torch.device] = Counter()
        peak: Counter[torch.device] = Counter()
        for device, place, size in self._log:
            live[device] += int(size * shares.get(place, 1.0))
            peak[device] = max(peak[device], live[device])
        return dict(peak)

    @contextmanager
    def running(self, *, grad: bool) -> Iterator[None]:
        """Run a block.

        Args:
            grad: whether gradients are recorded.

        Raises:
            InputError: it asks for values, or does what cannot be done without.
        """
        try:
            # Leaving inference_mode, whose tensors count no changes, turns the recording of gradients on.
            with torch.inference_mode(mode=False), torch.set_grad_enabled(grad), self:
                yield
        except (HookLensError, TypeError):
            # Of arguments, as the call itself would raise.
            raise
        except Exception as error:
            raise InputError(
                f"the memory of this call is not known before it runs: without values it stops with "
                f"{type(error).__name__}: {str(error).partition(chr(10))[0]}. Leave out what looks at values: "
                "functions in edits, parts of one's own that branch on activations"
            ) from error

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No graph is traced here, and keeping the tracer away from every operator would take half of the time."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors_in((args, kwargs))
        if self._can_have_values(func, given, args, kwargs):
            return self._count(func(*args, **kwargs), given)
        if func is torch.ops.aten._local_scalar_dense.default and self._unknown is not None:
            return torch.zeros((), dtype=given[0].dtype).item()
        if func is torch.ops.aten.searchsorted.Tensor:
            return self._count(_spread_evenly(*args[:2], out_int32=kwargs.get("out_int32", False)), given)
        if not all(isinstance(one, FakeTensor) for one in given):
            args, kwargs = tree_map_only(Tensor, self.without_values, (args, kwargs))
            given = _tensors_in((args, kwargs))
        with self._shapes:
            return self._count(func(*args, **kwargs), given)

    def _can_have_values(self, func: Any, given: Sequence[Tensor], args: Any, kwargs: Any) -> bool:
        """Whether all that an operator reads has values, and its result is small: whole numbers, flags, few floats."""
        if any(isinstance(one, FakeTensor) or self._is_large(one) for one in given):
            return False
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            return True
        # Drawn numbers would move on the generator of the run to come.
        if torch.Tag.nondeterministic_seeded in func.tags:
            return False
        args, kwargs = tree_map_only(Tensor, self.without_values, (args, kwargs))
        with self._shapes:
            made = func(*args, **kwargs)
        return not any(
            self._is_large(one) or (one.is_floating_point() and one.numel() > _MOST_FLOATS) for one in _tensors_in(made)
        )

    def _count(self, out: Any, given: Sequence[Tensor]) -> Any:
        before = {one.untyped_storage()._cdata for one in given}
        for tensor in _tensors_in(out):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in before or key in self._held:
                continue
            size, device = storage.nbytes(), tensor.device
            self.live[device] += size
            self.peak[device] = max(self.peak[device], self.live[device])
            self._held[key] = len(self._log)
            self._log.append((device, len(self._log), size))
            weakref.finalize(storage, self._forget, key, size, device)
        return out

    def _is_large(self, tensor: Tensor) -> bool:
        return tensor.numel() > self._most_with_values

    def _forget(self, key: int, size: int, device: torch.device) -> None:
        self._log.append((device, self._held.pop(key), -size))
        self.live[device] -= size


def find_tensors(original: object, shared: Iterable[object] = ()) -> list[Tensor]:
    """All tensors that objects hold, each once.

    Args:
        original: where to look.
        shared: where not to look.
    """
    seen, found, left = {id(one) for one in shared}, [], [original]
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, _SHARED_KINDS):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
        else:
            left += gc.get_referents(one)
    return found


def count_storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory that tensors keep alive; memory that several of them share counts once."""
    storages = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def _spread_evenly(ordered: Tensor, numbers: Tensor, *, out_int32: bool) -> Tensor:
    """Where each of the numbers 0, 1, ... ends among as many of each, as of tokens that experts share."""
    each = torch.arange(1, numbers.numel() + 1) * ordered.shape[-1] // max(numbers.numel(), 1)
    return each.to(device=numbers.device, dtype=torch.int32 if out_int32 else torch.int64)


def _tensors_in(tree: Any) -> list[Tensor]:
    """The tensors among what operators take and give: plain, or in lists, tuples and keywords."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    found = []
    for one in tree:
        if isinstance(one, Tensor):
            found.append(one)
        elif isinstance(one, list | tuple | dict):
            found += _tensors_in(one)
    return found
