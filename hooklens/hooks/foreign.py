"""Modules of others in the place of a hook point or a part: `block.hook_resid_post = my_module`, `block.mlp = MyMLP()`.

A network calls its points and parts with the tensor and the call. A module of somebody else takes the tensor alone, so
a module that is put in such a place gets a class that leaves the call out, between itself and its own class: it is the
same object, of its own class still, and is copied and pickled as one. What is inside of it belongs to the call: hook
points have names below the place, and parts of the network that it runs go on with the call.

The point that was there is no longer there. A new one in the place brings all back.
"""

import inspect
from collections.abc import Callable
from copyreg import __newobj__  # type: ignore[attr-defined]
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.errors import HookLensError, HookOutputError
from hooklens.hooks.call import Call, Listening, run_inside
from hooklens.hooks.point import HookPoint

_PLACED = "_placed_for"
# What the network asks of what stands in a place of its own.
_ASKED = ("own", "listens", "watch", "apply_weights", "apply_beside", "final_logits")


class Placed(nn.Module):
    """What a module of others is besides, in a place of a network."""

    # A point asks so whether anybody listens; the module does, as long as it is there.
    own = Listening()
    site = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Run the module on the tensors alone, as part of the call.

        Raises:
            HookOutputError: in the place of a hook point, it gave no tensor like the one that came in.
        """
        is_call = any(isinstance(one, Call) for one in arguments)
        if not (is_call and isinstance(self.__dict__.get(_PLACED), HookPoint)):
            return run_in_call(super().__call__, arguments, keywords)
        passing: Tensor = arguments[0]
        # A copy: the tensor may be used at another place, too, which an edit in place must not reach.
        made = run_in_call(super().__call__, (passing.clone(), *arguments[1:]), keywords)
        _check_like(made, passing, self)
        return made

    def __getattr__(self, name: str) -> Any:
        """What the module does not have, the network asks of the part that was there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            before = self.__dict__.get(_PLACED)
            if before is None or name.startswith("_"):
                raise
            found = getattr(before, name)
            if isinstance(found, Tensor):
                raise AttributeError(
                    f"{_own_class(type(self)).__name__} has no {name!r}; the weights of the {type(before).__name__} "
                    "that stood in its place are not the network's any more"
                ) from None
            return found

    def listens(self, call: Call) -> bool:
        """The module has to be run."""
        return True

    def watch(self, tensor: Tensor, call: Call) -> tuple[Tensor, bool]:
        """Run the module on a side tensor, and have the computation go on from what it gives."""
        return self(tensor, call), True

    def apply_weights(self, x: Tensor) -> Tensor:
        """In the place of a norm, the module as a plain function; hook points in it do not fire for a call."""
        normed: Tensor = run_inside(Call(), super().__call__, x)
        return normed

    def apply_beside(self, x: Tensor, call: Call) -> Tensor:
        """The same; no denominator of it is known that a call could hold."""
        return self.apply_weights(x)

    def final_logits(self, x: Tensor, outputs: Tensor | None = None) -> Tensor:
        """In the place of the unembedding, what a call gives, likewise; see `Unembed.final_logits`."""
        logits: Tensor = self.cap(run_inside(Call(), super().__call__, x))
        return logits if outputs is None else logits[..., outputs]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The module as it was; the place that it is in makes it fit again."""
        made: Any = super().__reduce_ex__(protocol)
        if not isinstance(made, tuple) or made[0] is not __newobj__:
            return made
        state = made[2]
        if isinstance(state, dict):
            state = {name: value for name, value in state.items() if name != _PLACED}
        return (_make_anew, (_own_class(type(self)), *made[1][1:]), state, *made[3:])


@cache
def _placed_class(own: Any) -> Any:
    names = {name: getattr(own, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(own)(own.__name__, (Placed, own), names)


def _own_class(placed: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had."""
    return placed.__mro__[placed.__mro__.index(Placed) + 1]


def _make_anew(own: type[nn.Module], *arguments: Any) -> nn.Module:
    """A module of a class, before its state is set."""
    return own.__new__(own, *arguments)


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


def outline(module: nn.Module) -> nn.Module:
    """What stood in a place, without its weights: the network asks it what it was, and computes with it no more.

    A hook point is given as it is.
    """
    if isinstance(module, HookPoint):
        return module
    bare: nn.Module = module.__class__.__new__(module.__class__)
    held = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        held[kind] = {name: None if one is None else _without_values(one) for name, one in held[kind].items()}
    held["_modules"] = {name: None if one is None else outline(one) for name, one in held["_modules"].items()}
    # Parts that are also kept beside the children, to be found sooner.
    held |= {name: one for name, one in held["_modules"].items() if name in held}
    bare.__dict__.update(held)
    return bare


def _without_values(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def check_placed(name: str, module: nn.Module, before: nn.Module) -> None:
    """Refuse a module of others that cannot fit into a place.

    Args:
        name: the attribute.
        module: the module.
        before: what stands there, or has stood there.

    Raises:
        HookLensError: it stands in a place of the other kind, or means something else by a name that the network asks.
    """
    kind, called = ("hook point" if isinstance(before, HookPoint) else "part"), type(module).__name__
    if isinstance(module, Placed):
        earlier = module.__dict__.get(_PLACED)
        if earlier is not None and isinstance(earlier, HookPoint) != isinstance(before, HookPoint):
            raise HookLensError(
                f"{name}: this {called} already stands in the place of a {type(earlier).__name__}, and is called "
                f"otherwise in that of a {kind}; set a module of its own there"
            )
        return
    taken = [one for one in _ASKED if hasattr(module, one)]
    if taken:
        raise HookLensError(
            f"{name}: a {called} has {taken}, which mean something else to the network in the place of a {kind}; wrap "
            "it in a torch.nn.Module whose forward(x) calls it, and set that"
        )
    own: Any = type(module)
    try:
        _placed_class(own)
    except TypeError as error:
        raise HookLensError(
            f"{name}: a {called} cannot stand in the place of a {kind} ({error}); wrap it in a torch.nn.Module whose "
            "forward(x) calls it, and set that"
        ) from None


def run_in_call(fn: Callable[..., Any], arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Run a function of tensors as part of the call that stands among its arguments, which it is not given."""
    call = next((one for one in (*arguments, *keywords.values()) if isinstance(one, Call)), None)
    arguments = tuple(one for one in arguments if not isinstance(one, Call))
    keywords = {name: one for name, one in keywords.items() if not isinstance(one, Call)}
    return fn(*arguments, **keywords) if call is None else run_inside(call, fn, *arguments, **keywords)


def takes_call(fn: Callable[..., Any]) -> bool:
    """Whether a function is given the call: it has a parameter of that name, or takes whatever it is given."""
    try:
        parameters = inspect.signature(fn, follow_wrapped=False).parameters
    except (TypeError, ValueError):
        return True
    return "call" in parameters or any(one.kind is one.VAR_POSITIONAL for one in parameters.values())


def _check_like(made: object, passing: Tensor, module: nn.Module) -> None:
    """Refuse what is no tensor like the one that came in.

    Raises:
        HookOutputError: says what it is.
    """
    wanted, found = (list(passing.shape), passing.dtype, passing.device), type(made).__name__
    if isinstance(made, Tensor):
        given = (list(made.shape), made.dtype, made.device)
        if given == wanted:
            return
        found = f"{given[0]}, {given[1]} on {given[2]},"
    raise HookOutputError(
        f"{type(module).__name__} in the place of a hook point gave {found} for {wanted[0]}, {wanted[1]} on "
        f"{wanted[2]}; expected a tensor like it. Nothing is broadcast, cast or moved"
    )
