"""Making parameters of tensors, several at a time.

Most tensors of a checkpoint are parameters as they lie in the file, or rows of larger ones, which are copied at the
speed of the memory. Others have to be turned, which one thread does at a fraction of that speed.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hooklens.config import DeclaredWeight
from hooklens.weights.layout import as_contiguous, in_order, is_turned, to_stored

Key = TypeVar("Key")

# As many tensors are on the way at a time, each of them beside its source.
_MOST_THREADS = 4


@dataclass(frozen=True)
class Placing:
    """What makes a parameter of a tensor.

    Attributes:
        tensor: the values.
        weight: the weight of which these are the logical shape; None: they are in the stored one.
        device: where to put them.
        dtype: to cast them to; None: their own.
    """

    tensor: Tensor
    weight: DeclaredWeight | None
    device: torch.device
    dtype: torch.dtype | None

    def is_long(self) -> bool:
        """Whether it turns much, on the host. Other copies are as fast as the memory on one thread."""
        if self.device.type != "cpu":
            return False
        tensor, weight = self.tensor, self.weight
        return is_turned(tensor if weight is None else in_order(tensor, weight.stored, weight.axes))

    def run(self) -> Tensor:
        """The parameter's tensor: as it is stored, contiguous."""
        placed = self.tensor.to(device=self.device, dtype=self.dtype)
        if placed.is_inference():
            placed = placed.clone()
        return as_contiguous(placed) if self.weight is None else to_stored(placed, self.weight.stored, self.weight.axes)


def run_ahead(placings: Iterable[tuple[Key, Placing]]) -> Iterator[tuple[Key, Tensor]]:
    """What each placing gives, in their order; long ones run on threads while the next ones are read.

    No more of them wait than there are threads, so that few tensors exist beside their sources. When whoever asks
    stops, those that have begun end first.
    """
    n_threads = min(_count_cores(), _MOST_THREADS)
    waiting: deque[tuple[Key, Tensor | Future[Tensor]]] = deque()
    n_long = 0
    with ThreadPoolExecutor(n_threads) as pool:
        for key, placing in placings:
            is_long = placing.is_long()
            waiting.append((key, pool.submit(placing.run) if is_long else placing.run()))
            n_long += is_long
            while waiting and (n_long > n_threads or not isinstance(waiting[0][1], Future)):
                first, placed = waiting.popleft()
                n_long -= isinstance(placed, Future)
                yield first, _result(placed)
        for last, placed in waiting:
            yield last, _result(placed)


def _result(placed: "Tensor | Future[Tensor]") -> Tensor:
    return placed.result() if isinstance(placed, Future) else placed


def _count_cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
