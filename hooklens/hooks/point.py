"""The hook point: a named place in a computation where tensors can be watched and edited.

A hook point returns its input after one attribute check when nobody listens. Three kinds of listeners
attach to it, and run in this order:

1. hooks, `fn(tensor, hook) -> None | tensor`, may edit: by returning another tensor, or in place by tensor
   operations (a write through `.data` or `.numpy()` leaves no trace that could be noticed);
2. gradient hooks, `fn(grad, hook) -> None | grad`, run in the backward pass;
3. captures only look, and see what the hooks made of the tensor.
"""

import inspect
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooklens.axes import find_site, layer_of
from hooklens.errors import HookLensError, HookNameError, HookOutputError

HookFunction = Callable[..., Tensor | None]
Direction = Literal["fwd", "bwd"]


class _Hook:
    """A registered hook function and how to call it."""

    __slots__ = ("by_keyword", "fn", "permanent", "removed")

    def __init__(self, fn: HookFunction, *, permanent: bool) -> None:
        if not callable(fn):
            raise HookLensError(f"a hook must be a function fn(tensor, hook), got {type(fn).__name__}")
        self.fn = fn
        self.permanent = permanent
        self.removed = False
        self.by_keyword = _takes_hook_by_keyword(fn)

    def __call__(self, tensor: Tensor, point: "HookPoint") -> Tensor | None:
        return self.fn(tensor, hook=point) if self.by_keyword else self.fn(tensor, point)


def _takes_hook_by_keyword(fn: HookFunction) -> bool:
    """Whether a parameter is called `hook`, which may then stand anywhere in the signature."""
    try:
        parameter = inspect.signature(fn).parameters.get("hook")
    except (TypeError, ValueError):
        return False
    return parameter is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY


class HookHandle:
    """Removes what was registered: `handle.remove()`, or as a context manager on leaving it."""

    def __init__(self, removals: list[Callable[[], None]]) -> None:
        self._removals = removals

    def remove(self) -> None:
        """Remove the hooks; doing so twice is harmless."""
        while self._removals:
            self._removals.pop()()

    def __enter__(self) -> "HookHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


class HookPoint(nn.Module):
    """The identity on a tensor, with a name, that listeners can attach to.

    Args:
        shared: the tensor that passes here is also used at another place, which an edit here must not
            reach. Hooks are then given a copy.

    Attributes:
        name: the hook name, set by the model that holds the point.
        ctx: a dictionary for hook functions to keep things in between calls.
        listening: whether anything is attached.
    """

    name: str | None
    ctx: dict[Any, Any]
    listening: bool

    def __init__(self, *, shared: bool = False) -> None:
        super().__init__()
        self.name = None
        self.ctx = {}
        self.shared = shared
        self.listening = False
        self._hooks: list[_Hook] = []
        self._gradient_hooks: list[_Hook] = []
        self._captures: list[Callable[[Tensor, HookPoint], None]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        """Pass the tensor on; with listeners, as they leave it."""
        return self._fire(tensor, needs_verdict=self.shared)[0] if self.listening else tensor

    def watch(self, tensor: Tensor) -> tuple[Tensor, bool]:
        """Show listeners a side tensor, which the computation does not go through by itself.

        Returns:
            The tensor as the listeners leave it, and whether the computation has to go on from it: it was
            edited, or gradients are to flow through it.
        """
        return self._fire(tensor, needs_verdict=True)

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
        site = None if self.name is None else find_site(self.name)
        if site is None or len(site.axes) != tensor.ndim:
            return f"{self.name!r} {list(tensor.shape)}"
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(site.axes, tensor.shape, strict=True))
        return f"{self.name!r} [{sizes}]"

    def add_hook(
        self, fn: HookFunction, *, dir: Direction = "fwd", prepend: bool = False, is_permanent: bool = False
    ) -> HookHandle:
        """Attach a hook.

        Args:
            fn: `fn(tensor, hook)` returns None to keep the tensor (or its in-place edit) or a tensor of
                the same shape, dtype and device to replace it.
            dir: `"fwd"`, or `"bwd"` for gradients.
            prepend: run before the hooks already there.
            is_permanent: survive `reset_hooks`.
        """
        if dir not in ("fwd", "bwd"):
            raise HookLensError(f"hook direction is {dir!r}; expected 'fwd' or 'bwd'")
        hooks = self._hooks if dir == "fwd" else self._gradient_hooks
        hook = _Hook(fn, permanent=is_permanent)
        hooks.insert(0 if prepend else len(hooks), hook)
        self._update_listening()

        def remove() -> None:
            hook.removed = True
            if hook in hooks:
                hooks.remove(hook)
            self._update_listening()

        return HookHandle([remove])

    def add_capture(self, capture: Callable[[Tensor, "HookPoint"], None]) -> None:
        """Attach a function that only looks; it must not edit the tensor."""
        self._captures.append(capture)
        self.__dict__["listening"] = True

    def remove_capture(self, capture: Callable[[Tensor, "HookPoint"], None]) -> None:
        """Detach what `add_capture` attached."""
        self._captures.remove(capture)
        self._update_listening()

    def remove_hooks(self, *, dir: Direction | Literal["both"] = "both", including_permanent: bool = False) -> None:
        """Remove the hooks of a direction, those added as permanent only when asked to."""
        for direction, hooks in (("fwd", self._hooks), ("bwd", self._gradient_hooks)):
            if dir not in (direction, "both"):
                continue
            for hook in [hook for hook in hooks if including_permanent or not hook.permanent]:
                hook.removed = True
                hooks.remove(hook)
        self._update_listening()

    def _update_listening(self) -> None:
        self.__dict__["listening"] = bool(self._hooks or self._gradient_hooks or self._captures)

    def _fire(self, tensor: Tensor, *, needs_verdict: bool) -> tuple[Tensor, bool]:
        current, changed = tensor, False
        if self._hooks:
            current, changed = self._run_hooks(tensor, needs_verdict=needs_verdict)
        if self._gradient_hooks:
            current, tapped = self._attach_gradient_hooks(current, is_copy=current is not tensor)
            changed = changed or tapped
        for capture in self._captures:
            capture(current, self)
        return current, changed

    def _run_hooks(self, tensor: Tensor, *, needs_verdict: bool) -> tuple[Tensor, bool]:
        """Run the hooks; the verdict says whether the tensor differs, and is only made where needed."""
        handed = tensor.clone() if self.shared else tensor
        # Tensors made under inference_mode keep no version counter: an edit shows only against a copy.
        untracked = handed.is_inference()
        before = tensor if self.shared else (tensor.clone() if untracked and needs_verdict else None)
        version = None if untracked else handed._version
        current = handed
        for hook in tuple(self._hooks):
            returned = hook(current, self)
            if returned is not None:
                self._check_replacement(returned, current, source="hook")
                current = returned
        if not needs_verdict:
            return current, False
        changed = current is not handed or _is_tapped(handed)
        if not changed:
            changed = handed._version != version if version is not None else not torch.equal(handed, before)  # type: ignore[arg-type]
        if self.shared and not changed and not handed.requires_grad:
            return tensor, False
        return current, changed

    def _attach_gradient_hooks(self, tensor: Tensor, *, is_copy: bool) -> tuple[Tensor, bool]:
        if not tensor.requires_grad:
            if all(hook.permanent for hook in self._gradient_hooks):
                return tensor, False
            raise HookLensError(
                f"backward hook at {self.describe(tensor)}: no gradient flows here; call the model with gradients "
                "enabled (not under torch.no_grad or inference_mode) and with parameters that require them"
            )
        if self.shared and not is_copy:
            tensor = tensor.view_as(tensor)
        for hook in tuple(self._gradient_hooks):
            tensor.register_hook(self._gradient_listener(hook))  # type: ignore[no-untyped-call]
        return tensor, True

    def _gradient_listener(self, hook: _Hook) -> Callable[[Tensor], Tensor | None]:
        def listen(gradient: Tensor) -> Tensor | None:
            if hook.removed:
                return None
            returned = hook(gradient, self)
            if returned is not None:
                self._check_replacement(returned, gradient, source="backward hook")
            return returned

        return listen

    def _check_replacement(self, returned: Any, expected: Tensor, *, source: str) -> None:
        subject = f"{source} at {self.describe(expected)}"
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

    def extra_repr(self) -> str:
        """The name, in the model's printed form."""
        return repr(self.name) if self.name else ""


def _is_tapped(tensor: Tensor) -> bool:
    """Whether a hook asked for the tensor's own gradient, by `retain_grad` or `register_hook`."""
    return tensor.requires_grad and (tensor.retains_grad or bool(tensor._backward_hooks))
