"""Modules of others in the place of a hook point or a part: `block.hook_resid_post = my_module`, `block.mlp = MyMLP()`.

A network calls its points and parts with the tensor and the call. A module of somebody else takes the tensor alone, so
a module that is put in such a place gets a class that leaves the call out, between itself and its own class: it is the
same object, of its own class still. What is inside of it hears the listeners of the call: hook points have names below
the place, and parts of the network that it runs go on with the call.

The point that was there is no longer there. A new one in the place brings all back.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor, nn

from hooklens.errors import HookOutputError
from hooklens.hooks.call import Call, Listening, run_apart, run_listening

_PLACED = "_placed_for"


class Placed(nn.Module):
    """What a module of others is besides, in a place of a network."""

    # A point asks so whether anybody listens; the module does, as long as it is there.
    own = Listening()
    site = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the module on the tensors alone, for whoever listens to the call."""
        return run_in_call(super().__call__, arguments, keywords)

    def __getattr__(self, name: str) -> Any:
        """What the module does not have, the network asks of the part that was there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            before = self.__dict__.get(_PLACED)
            if before is None or name.startswith("_"):
                raise
            return getattr(before, name)

    def listens(self, call: Call) -> bool:
        """The module has to be run."""
        return True

    def watch(self, tensor: Tensor, call: Call) -> tuple[Tensor, bool]:
        """Run the module on a side tensor, and have the computation go on from what it gives."""
        out = self(tensor, call)
        found = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        if found != list(tensor.shape):
            raise HookOutputError(
                f"{type(self).__name__} in the place of a hook point gave {found} for {list(tensor.shape)}; expected a "
                "tensor of that shape"
            )
        return out, True


@cache
def _placed_class(own: Any) -> Any:
    return type(own.__name__, (Placed, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


def place(module: nn.Module, before: nn.Module) -> None:
    """Make a module of others fit into a place of a network.

    Args:
        module: it is changed: its class becomes one derived from its own.
        before: what has stood there.
    """
    if not isinstance(module, Placed):
        own: Any = type(module)
        module.__class__ = _placed_class(own)
    # Past nn.Module, which would make it a child.
    module.__dict__[_PLACED] = before


def run_in_call(fn: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Run a function of tensors as part of the call that stands among its arguments, which it is not given."""
    call = next((one for one in (*arguments, *keywords.values()) if isinstance(one, Call)), None)
    arguments = tuple(one for one in arguments if not isinstance(one, Call))
    keywords = {name: one for name, one in keywords.items() if not isinstance(one, Call)}
    if call is None or not call.listeners:
        return fn(*arguments, **keywords)
    # The call's listeners are those of the thread's `with` blocks, too.
    return run_apart(run_listening, call.listeners, fn, *arguments, **keywords)


def takes_call(fn: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether a function can be given these arguments, the call among them."""
    try:
        inspect.signature(fn).bind(*arguments, **keywords)
    except TypeError:
        return False
    except ValueError:
        return True
    return True
