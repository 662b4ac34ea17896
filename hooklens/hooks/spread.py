"""Activations that several processes hold in parts, and listeners that are shown them whole.

A network may be spread over processes (`hooklens.parallel`): each computes some heads or neurons. A hook point there
passes this process's part on; who listens is given the whole tensor, put together only then, and what they leave is
taken apart again. All processes make the same call with the same listeners.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from hooklens.hooks.call import Call, Listening

# Blocks in which listeners are given what their process holds.
_shows_parts: ContextVar[bool] = ContextVar("hooklens_shows_parts", default=False)


class Spread:
    """How the processes of a group share a tensor: each holds a part of it, along one axis."""

    @property
    def n_parts(self) -> int:
        """How many processes there are."""
        raise NotImplementedError

    @property
    def part(self) -> int:
        """Which part this process holds."""
        raise NotImplementedError

    def gather(self, part: Tensor, dim: int) -> Tensor:
        """The whole tensor, of the parts; its gradient, which all processes have, goes to each part."""
        raise NotImplementedError

    def scatter(self, whole: Tensor, dim: int) -> Tensor:
        """This process's part of a tensor that all have; its gradient is put together of those of the parts."""
        raise NotImplementedError

    def use(self, whole: Tensor) -> Tensor:
        """A tensor that all have, of which each process uses what it needs; their gradients are summed."""
        raise NotImplementedError


class Relay:
    """What a call does at hook points whose listeners are in other processes, too, or whose rows are."""

    def fire(self, point: Any, tensor: Tensor, call: "Call", listening: "Listening") -> tuple[Tensor, bool]:
        """Show listeners everywhere what passes a point: what this process goes on with, and whether it differs."""
        raise NotImplementedError


class SpreadPoint:
    """How a hook point shows what passes it: whole, though each process has a part of it.

    Args:
        spread: how the processes share it.
        dim: the axis along which they do.
    """

    def __init__(self, spread: Spread, dim: int) -> None:
        self.spread, self.dim = spread, dim

    def gather(self, part: Tensor) -> Tensor:
        """What listeners are given."""
        return self.spread.gather(part, self.dim)

    def scatter(self, whole: Tensor) -> Tensor:
        """What the process goes on with."""
        return self.spread.scatter(whole, self.dim)


def tap_alike(part: Tensor, whole: Tensor) -> Tensor:
    """The part of a tensor; where somebody waits for the gradient of the whole, it can be told of the part, too."""
    if is_tapped(whole) and part.requires_grad:
        part.register_hook(lambda gradient: None)  # type: ignore[no-untyped-call]
    return part


def is_tapped(tensor: Tensor) -> bool:
    """Whether somebody asked for the tensor's own gradient, by `retain_grad` or `register_hook`."""
    return tensor.requires_grad and (tensor.retains_grad or bool(tensor._backward_hooks))


def shows_parts() -> bool:
    """Whether the thread is inside of `local_parts`."""
    return _shows_parts.get()


@contextmanager
def local_parts() -> Iterator[None]:
    """A `with` block in whose calls listeners are given what their own process holds, and nothing is put together.

    Of the 12 heads of a layer that two processes share, `hook_z` then shows six. A hook function that works on each
    head or neuron by itself saves the traffic so; one that counts them, or names one by its number, would be wrong.
    """
    token = _shows_parts.set(True)
    try:
        yield
    finally:
        _shows_parts.reset(token)
