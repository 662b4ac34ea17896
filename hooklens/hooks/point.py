"""Hook points: where an activation can be read and changed.

A `HookPoint` passes its tensor through. With nobody listening a call costs an attribute check. What a hook function
returns takes the tensor's place; so does the tensor itself, edited in place. Where a point shows a side tensor (the
attention pattern beside the fused kernel, a norm's scale), the module asks `watch` for the verdict whether the
computation has to go on from what the listeners left.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooklens.axes import HookSite, layer_of
from hooklens.errors import HookLensError, HookNameError, HookOutputError
from hooklens.hooks.call import (
    Call,
    Direction,
    Hook,
    HookFunction,
    HookHandle,
    Listening,
    open_call,
    run_apart,
    thread_listeners,
)
from hooklens.hooks.changes import note_change
from hooklens.hooks.spread import SpreadPoint, is_tapped, shows_parts, tap_alike

_NO_CALL = Call()


class HookPoint(nn.Module):
    """The identity on a tensor, with a name, that listeners can attach to.

    Args:
        site: what the point carries; None in modules of one's own, unless its axes are to be known.
        shared: the tensor that passes here is also used at another place, which an edit here must not reach. Hooks
            are then given a copy.

    Attributes:
        name: the name in the model that was built with the point. A hook function is told the name that the module
            has for it through which the hook was attached.
        ctx: a dictionary for hook functions to keep things in between calls.
        own: what `add_hook` attached; None: nothing.
        spread: how several processes share what passes here; None: each has all of it.
    """

    name: str | None
    ctx: dict[Any, Any]
    site: HookSite | None
    shared: bool
    own: Listening | None
    spread: SpreadPoint | None

    def __init__(self, site: HookSite | None = None, *, shared: bool = False) -> None:
        super().__init__()
        # Past nn.Module's __setattr__: a model has hundreds of points.
        self.__dict__.update(name=None, ctx={}, site=site, shared=shared, own=None, spread=None)

    def __call__(self, tensor: Tensor, call: Call | None = None) -> Tensor:
        """Pass the tensor on; with listeners, as they leave it.

        Args:
            tensor: the activation.
            call: the call in progress. Modules whose forward is handed none leave it out.
        """
        own, heard = self.own, thread_listeners() if call is None else call.listeners
        if own is None and not heard:
            return tensor
        listening = heard.get(self)
        if listening is None and own is None:
            return tensor
        if (self.spread is not None or (call is not None and call.relay is not None)) and not shows_parts():
            return self._fire_whole(tensor, call or open_call(), join_listening(own, listening))[0]
        if own is None and listening is not None and not (listening.hooks or listening.gradient_hooks):
            for watcher in listening.watchers:
                watcher.keep(tensor, self, open_call() if call is None else call)
            return tensor
        return self._fire(tensor, call or open_call(), join_listening(own, listening), needs_verdict=self.shared)[0]

    @property
    def listening(self) -> bool:
        """Whether `add_hook` attached anything."""
        return self.own is not None

    def listens(self, call: Call) -> bool:
        """Whether anybody listens here in a call."""
        return call.hears(self)

    def watch(self, tensor: Tensor, call: Call) -> tuple[Tensor, bool]:
        """Show listeners a side tensor, which the computation does not go through by itself.

        Returns:
            The tensor as the listeners leave it, and whether the computation has to go on from it: it was
            edited, or gradients are to flow through it.
        """
        listening = call.listeners.get(self)
        if (self.spread is not None or call.relay is not None) and not shows_parts():
            return self._fire_whole(tensor, call, join_listening(self.own, listening))
        if self.own is None and listening is not None and not (listening.hooks or listening.gradient_hooks):
            for watcher in listening.watchers:
                watcher.keep(tensor, self, call)
            return tensor, False
        return self._fire(tensor, call, join_listening(self.own, listening), needs_verdict=True)

    def layer(self) -> int:
        """The layer in the point's name.

        Raises:
            HookNameError: the point does not stand in a block.
        """
        layer = None if self.name is None else layer_of(self.name)
        if layer is None:
            raise HookNameError(f"hook point {self.name!r} does not belong to a layer")
        return layer

    def describe(self, tensor: Tensor) -> str:
        """The point's name and its tensor's axes with sizes, for messages."""
        if self.site is None or len(self.site.axes) != tensor.ndim:
            return f"{self.name!r} {list(tensor.shape)}"
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(self.site.axes, tensor.shape, strict=True))
        return f"{self.name!r} [{sizes}]"

    def called(self, name: str) -> "HookPoint":
        """The point under the name that some module has for it: itself, or another face of it with one `ctx`."""
        if self.name == name:
            return self
        face = HookPoint(self.site, shared=self.shared)
        face.name = name
        face.ctx = self.ctx
        return face

    def add_hook(
        self, fn: HookFunction, *, dir: Direction = "fwd", prepend: bool = False, is_permanent: bool = False
    ) -> HookHandle:
        """Attach a hook that acts in every call; the arguments are those of `HookedModule.add_hook`."""
        return self.attach(Hook(fn, self, permanent=is_permanent), dir=dir, prepend=prepend)

    def attach(self, hook: Hook, *, dir: Direction = "fwd", prepend: bool = False) -> HookHandle:
        """Attach a hook made by somebody else."""
        if dir not in ("fwd", "bwd"):
            raise HookLensError(f"hook direction is {dir!r}; expected 'fwd' or 'bwd'")
        own = Listening() if self.own is None else self.own.joined(Listening())
        hooks = own.hooks if dir == "fwd" else own.gradient_hooks
        hooks.insert(0 if prepend else len(hooks), hook)
        self.__dict__["own"] = own
        return HookHandle([lambda: self._keep_hooks(lambda other: other is not hook)])

    def remove_hooks(self, *, dir: Direction | Literal["both"] = "both", including_permanent: bool = False) -> None:
        """Remove the hooks of a direction, those added as permanent only when asked to."""
        self._keep_hooks(lambda hook: hook.permanent and not including_permanent, dir=dir)

    def _keep_hooks(self, stays: Callable[[Hook], bool], *, dir: Direction | Literal["both"] = "both") -> None:
        own = self.own
        if own is None:
            return
        # A new list: a call in another thread may be reading the old one.
        forward = [hook for hook in own.hooks if dir == "bwd" or stays(hook)]
        gradient = [hook for hook in own.gradient_hooks if dir == "fwd" or stays(hook)]
        for hook in (*own.hooks, *own.gradient_hooks):
            hook.removed = hook not in forward and hook not in gradient
        self.__dict__["own"] = Listening(forward, gradient) if forward or gradient else None

    def _fire(self, tensor: Tensor, call: Call, listening: Listening, *, needs_verdict: bool) -> tuple[Tensor, bool]:
        current, changed = tensor, False
        if listening.hooks:
            current, changed = self._run_hooks(tensor, call, listening.hooks, needs_verdict=needs_verdict)
        if listening.gradient_hooks:
            current, tapped = self._attach_gradient_hooks(current, listening.gradient_hooks, tensor)
            changed = changed or tapped
        for watcher in listening.watchers:
            watcher.keep(current, self, call)
        return current, changed

    def _fire_whole(self, part: Tensor, call: Call, listening: Listening) -> tuple[Tensor, bool]:
        """Show listeners the whole tensor of which this process holds a part; what they leave of that part, and
        whether they changed anything.
        """
        whole = part if self.spread is None else self.spread.gather(part)
        if call.relay is None:
            left, changed = self.fire(whole, call, listening)
        else:
            left, changed = call.relay.fire(self, whole, call, listening)
        # With gradients the computation goes through what was shown: so it has one.
        if not (changed or left.requires_grad):
            return part, False
        return (left if self.spread is None else tap_alike(self.spread.scatter(left), left)), changed

    def fire(self, tensor: Tensor, call: Call, listening: Listening) -> tuple[Tensor, bool]:
        """What some listeners leave of a tensor, and whether it differs."""
        return self._fire(tensor, call, listening, needs_verdict=True)

    def _run_hooks(
        self, tensor: Tensor, call: Call, hooks: Sequence[Hook], *, needs_verdict: bool
    ) -> tuple[Tensor, bool]:
        """Run the hooks; the verdict says whether the tensor differs, and is only made where needed."""
        handed = tensor.clone() if self.shared else tensor
        # Tensors made under inference_mode keep no version counter: an edit shows only against a copy.
        is_traced = torch.compiler.is_compiling()
        untracked = is_traced or handed.is_inference()
        before = tensor if self.shared or is_traced else (tensor.clone() if untracked and needs_verdict else None)
        version = None if untracked else handed._version
        current = handed
        for place, hook in enumerate(hooks):
            returned = run_apart(hook.run, current, call)
            if returned is None:
                continue
            self._check_replacement(returned, current, hook, source="hook")
            # A later hook may edit in place, which the tensor that somebody else holds must not feel.
            is_foreign = returned is not current and place + 1 < len(hooks)
            current = returned.clone() if is_foreign else returned
        if not needs_verdict:
            return current, False
        # A traced graph cannot ask, and goes on from what the hooks left.
        changed = is_traced or current is not handed or is_tapped(handed)
        if not changed:
            changed = handed._version != version if version is not None else not torch.equal(handed, before)  # type: ignore[arg-type]
        if self.shared and not changed and not handed.requires_grad:
            return tensor, False
        return current, changed

    def _attach_gradient_hooks(self, tensor: Tensor, hooks: Sequence[Hook], passing: Tensor) -> tuple[Tensor, bool]:
        if not tensor.requires_grad:
            if all(hook.permanent for hook in hooks) or not tensor.is_floating_point():
                return tensor, False
            if not torch.is_grad_enabled() or tensor.is_inference():
                raise HookLensError(
                    f"backward hook at {self.describe(tensor)}: no gradient flows here; call the model with gradients "
                    "enabled (not under torch.no_grad or inference_mode)"
                )
            # What nothing trainable leads to has a gradient all the same: a value put in by an edit, for one.
            tensor = tensor.detach().requires_grad_()
        elif self.shared and tensor is passing:
            tensor = tensor.view_as(tensor)
        for hook in hooks:
            tensor.register_hook(self._gradient_listener(hook))  # type: ignore[no-untyped-call]
        return tensor, True

    def _gradient_listener(self, hook: Hook) -> Callable[[Tensor], Tensor | None]:
        def listen(gradient: Tensor) -> Tensor | None:
            if hook.removed:
                return None
            returned = run_apart(hook.run, gradient, _NO_CALL)
            if returned is not None:
                self._check_replacement(returned, gradient, hook, source="backward hook")
            return returned

        return listen

    def _check_replacement(self, returned: Any, expected: Tensor, hook: Hook, *, source: str) -> None:
        subject = f"{source} at {hook.point.describe(expected)}"
        if not isinstance(returned, Tensor):
            raise HookOutputError(
                f"{subject} returned a {type(returned).__name__}; expected None (keep) or a tensor of that shape"
            )
        found = (tuple(returned.shape), returned.dtype, returned.device)
        wanted = (tuple(expected.shape), expected.dtype, expected.device)
        if found != wanted:
            raise HookOutputError(
                f"{subject} returned shape {list(found[0])}, {found[1]} on {found[2]}; expected "
                f"{list(wanted[0])}, {wanted[1]} on {wanted[2]}. Nothing is broadcast, cast or moved: "
                "return a tensor like the one that came in"
            )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            note_change()

    def extra_repr(self) -> str:
        """The name, in the model's printed form."""
        return repr(self.name) if self.name else ""


def join_listening(own: Listening | None, heard: Listening | None) -> Listening:
    """What listens: what the point has of its own, then what the call brings."""
    if own is None:
        return heard or Listening()
    return own.joined(heard)
