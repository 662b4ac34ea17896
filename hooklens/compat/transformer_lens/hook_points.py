"""Hook points with the methods of TransformerLens 2.x, and modules that hold them: hooks stay on points, in levels."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hooklens import hooks
from hooklens.compat.transformer_lens.utils import Slice, SliceInput
from hooklens.hooks.call import Call, Hook

# "fwd", "bwd" or, where hooks are removed, "both".
Dir = Any
HookFunction = Callable[..., Any]
NamesFilter = Callable[[str], bool] | Sequence[str] | str | None
HookList = Sequence[tuple[str | Callable[[str], bool], HookFunction]]
Root = TypeVar("Root", bound="HookedRootModule")
DeviceType = torch.device | str | None

# Axes that tokens stand along, where a point says what it carries.
_POSITIONS = ("pos", "query")
# Points of modules of one's own say it by their name: these have a head axis behind their positions.
_PER_HEAD = ("hook_q", "hook_k", "hook_v", "hook_z", "hook_result")


class LensHandle(Hook):
    """A hook with its level; that of a point which a setting turns off (`use_attn_result`) is silent meanwhile.

    Attributes:
        user_hook: the function.
        is_permanent: whether `reset_hooks` leaves it.
    """

    __slots__ = ("context_level", "dir", "is_permanent", "user_hook")

    def __init__(
        self, fn: HookFunction, point: "HookPoint", *, dir: str = "fwd", permanent: bool = False,
        level: int | None = None,
    ) -> None:  # fmt: skip
        # 2.x calls every hook so.
        super().__init__(fn, point, permanent=permanent, form="hook=")
        self.user_hook, self.is_permanent, self.dir, self.context_level = fn, permanent, dir, level

    # PyTorch hands backward hooks to the graph in the forward pass: they act in it, though they are removed since.
    removed = property(lambda self: False, lambda self, value: None)

    @property
    def hook(self) -> "LensHandle":
        """What has `remove()`."""
        return self

    def remove(self) -> None:
        """Remove the hook."""
        self.point._keep_hooks(lambda one: one is not self)

    def run(self, tensor: Tensor, call: Call) -> Any:
        """What the function makes of a tensor."""
        if isinstance(self.point, HookPoint) and not self.point.is_on():
            return None
        returned: Any = self.fn(tensor, hook=self.point)
        # PyTorch takes a gradient as a tuple of one.
        is_wrapped = self.dir == "bwd" and isinstance(returned, tuple) and len(returned) == 1
        return returned[0] if is_wrapped else returned


class HookPoint(hooks.HookPoint):
    """A hook point with the methods of 2.x.

    Attributes:
        turned_on: says whether the model's settings let hooks act here; None: they do.
    """

    turned_on: Callable[[], bool] | None = None

    def __init__(self) -> None:
        super().__init__()

    def is_on(self) -> bool:
        """Whether the model's settings let hooks act here."""
        return self.turned_on is None or self.turned_on()

    @property
    def fwd_hooks(self) -> list[Any]:
        """The hooks on the activation."""
        return list(self.own.hooks) if self.own else []

    @property
    def bwd_hooks(self) -> list[Any]:
        """The hooks on its gradient."""
        return list(self.own.gradient_hooks) if self.own else []

    def add_perma_hook(self, hook: HookFunction, dir: Dir = "fwd") -> None:
        """Attach a hook that `reset_hooks` leaves."""
        self.add_hook(hook, dir=dir, is_permanent=True)

    def add_hook(  # type: ignore[override]
        self, hook: HookFunction, dir: Dir = "fwd", is_permanent: bool = False, level: int | None = None,
        prepend: bool = False,
    ) -> None:  # fmt: skip
        """Attach `hook(tensor, hook=point)`."""
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"Invalid direction {dir}")
        self.attach(LensHandle(hook, self, dir=dir, permanent=is_permanent, level=level), dir=dir, prepend=prepend)

    # By position or by name takes all that by name alone does; pyright says otherwise.
    def remove_hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, dir: Dir = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove the hooks of a direction and level; of all levels where permanent ones go, too."""
        chosen = self.select_hooks(dir, including_permanent, None if including_permanent else level)
        self._keep_hooks(lambda hook: hook not in chosen, dir=dir)

    def has_hooks(self, dir: Dir = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether there are hooks of a direction and level."""
        return bool(self.select_hooks(dir, including_permanent, level))

    def select_hooks(self, dir: Dir = "both", including_permanent: bool = True, level: int | None = None) -> list[Any]:
        """The hooks of a direction and level."""
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"Invalid direction {dir}")
        return [
            one
            for one in [*(self.fwd_hooks if dir != "bwd" else ()), *(self.bwd_hooks if dir != "fwd" else ())]
            if (including_permanent or not one.permanent)
            and (level is None or getattr(one, "context_level", None) == level)
        ]

    def _check_replacement(self, returned: Any, expected: Tensor, hook: Hook, *, source: str) -> None:
        # Modules of one's own may change shapes.
        if self.site is not None:
            super()._check_replacement(returned, expected, hook, source=source)

    def clear_context(self) -> None:
        """Empty `ctx`."""
        self.__dict__["ctx"] = {}

    def layer(self) -> int:
        """The layer in the name."""
        if self.name is None:
            raise ValueError("Name cannot be None")
        return int(self.name.split(".")[1])


class HookedRootModule(nn.Module):
    """A module that knows the hook points inside it by name, once `setup` was called."""

    mod_dict: dict[str, nn.Module]
    hook_dict: dict[str, HookPoint]

    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.is_caching, self.context_level = False, 0

    def setup(self) -> None:
        """Name all modules and find the hook points; to be called once the layers are there."""
        self.mod_dict, self.hook_dict = {}, {}
        for name, module in self.named_modules():
            if name:
                module.__dict__["name"] = name
                self.mod_dict[name] = module
                if isinstance(module, HookPoint):
                    self.hook_dict[name] = module

    def hook_points(self) -> Any:
        """All hook points."""
        return self.hook_dict.values()

    def list_hooks(
        self, dir: Dir = "both", level: int | None = None, including_permanent: bool = True
    ) -> dict[str, list[LensHandle]]:
        """The hooks there are, by the names of their points."""
        found = {name: point.select_hooks(dir, including_permanent, level) for name, point in self.hook_dict.items()}
        return {name: chosen for name, chosen in found.items() if chosen}

    def remove_all_hook_fns(
        self, direction: Dir = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove hooks from all points."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    def clear_contexts(self) -> None:
        """Empty the `ctx` of all points."""
        for point in self.hook_points():
            point.clear_context()

    def reset_hooks(
        self, clear_contexts: bool = True, direction: Dir = "both", including_permanent: bool = False,
        level: int | None = None,
    ) -> None:  # fmt: skip
        """Remove hooks from all points, and empty their `ctx`."""
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level=level)
        self.is_caching = False

    def check_and_add_hook(
        self, hook_point: HookPoint, hook_point_name: str, hook: HookFunction, dir: Dir = "fwd",
        is_permanent: bool = False, level: int | None = None, prepend: bool = False,
    ) -> None:  # fmt: skip
        """Attach a hook that passes the module's checks."""
        self.check_hooks_to_add(hook_point, hook_point_name, hook, dir=dir, is_permanent=is_permanent, prepend=prepend)
        hook_point.add_hook(hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    def check_hooks_to_add(
        self, hook_point: HookPoint, hook_point_name: str, hook: HookFunction, dir: Dir = "fwd",
        is_permanent: bool = False, prepend: bool = False,
    ) -> None:  # fmt: skip
        """Checks of a subclass."""

    def add_hook(
        self, name: str | Callable[[str], bool], hook: HookFunction, dir: Dir = "fwd", is_permanent: bool = False,
        level: int | None = None, prepend: bool = False,
    ) -> None:  # fmt: skip
        """Attach a hook to the point of a name, or to all whose names a function says yes to."""
        for own, point in self._choose(name).items():
            assert isinstance(point, HookPoint), f"{own} is no hook point"
            self.check_and_add_hook(point, own, hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: str | Callable[[str], bool], hook: HookFunction, dir: Dir = "fwd") -> None:
        """Attach a hook that `reset_hooks` leaves."""
        self.add_hook(name, hook, dir=dir, is_permanent=True)

    def _choose(self, name: str | Callable[[str], bool]) -> dict[str, Any]:
        """The point of a name, or those of all names that a function says yes to."""
        if isinstance(name, str):
            return {name: self.mod_dict[name]}
        return {own: point for own, point in self.hook_dict.items() if name(own)}

    @contextmanager
    def hooks(
        self: Root, fwd_hooks: HookList = (), bwd_hooks: HookList = (), reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Root]:  # fmt: skip
        """Hooks of a `with` block, one level above those around it; leaving it removes all hooks of that level."""
        try:
            self.context_level += 1
            for dir, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                for name, hook in pairs:
                    for point in self._choose(name).values():
                        point.add_hook(hook, dir=dir, level=self.context_level)
            yield self
        finally:
            if reset_hooks_end:
                self.reset_hooks(clear_contexts, including_permanent=False, level=self.context_level)
            self.context_level -= 1

    def run_with_hooks(
        self, *model_args: Any, fwd_hooks: HookList = (), bwd_hooks: HookList = (), reset_hooks_end: bool = True,
        clear_contexts: bool = False, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        """Run with hooks of this call."""
        if bwd_hooks and reset_hooks_end:
            logging.warning(
                "run_with_hooks removes its hooks at the end, backward hooks before any backward pass can run: give "
                "reset_hooks_end=False, or run backward inside `with model.hooks(...)`"
            )
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts) as hooked:
            return hooked.forward(*model_args, **model_kwargs)

    def run_with_cache(
        self, *model_args: Any, names_filter: NamesFilter = None, device: DeviceType = None,
        remove_batch_dim: bool = False, incl_bwd: bool = False, reset_hooks_end: bool = True,
        clear_contexts: bool = False, pos_slice: Slice | SliceInput | None = None, **model_kwargs: Any,
    ) -> tuple[Any, Any]:  # fmt: skip
        """Run, and keep activations in a dictionary."""
        cache, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice)
        with self.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
            out = self(*model_args, **model_kwargs)
            if incl_bwd:
                out.backward()
        return out, cache

    def get_caching_hooks(
        self, names_filter: NamesFilter = None, incl_bwd: bool = False, device: DeviceType = None,
        remove_batch_dim: bool = False, cache: dict[str, Tensor] | None = None,
        pos_slice: Slice | SliceInput | None = None,
    ) -> tuple[dict[str, Tensor], list[Any], list[Any]]:  # fmt: skip
        """A dictionary, and the hooks that fill it; nothing is attached."""
        cache = {} if cache is None else cache
        columns = Slice.unwrap(pos_slice)
        self.is_caching = True
        names = self._select(names_filter)

        def keep(tensor: Tensor, hook: HookPoint, ending: str) -> None:
            kept = tensor.detach() if device is None else tensor.detach().to(device)
            kept = kept[0] if remove_batch_dim else kept
            axis = _position_axis(hook)
            if tensor.ndim >= -axis:
                kept = columns.apply(kept, dim=axis)
            cache[f"{hook.name}{ending}"] = kept

        fwd = [(name, partial(keep, ending="")) for name in names]
        return cache, fwd, [(name, partial(keep, ending="_grad")) for name in names] if incl_bwd else []

    def _select(self, names_filter: NamesFilter) -> list[str]:
        """The names of the points that a filter selects and that are turned on."""
        if not (isinstance(names_filter, str | list | tuple | set | None) or callable(names_filter)):
            raise ValueError("names_filter must be a string, list of strings, or function")
        given = {names_filter} if isinstance(names_filter, str) else names_filter
        if isinstance(given, list | tuple | set) and (unknown := sorted(set(given) - self.hook_dict.keys())):
            logging.warning(f"names_filter: no hook points of the names {unknown}; nothing is kept for them")
        return [
            name
            for name, point in self.hook_dict.items()
            if (given is None or (given(name) if callable(given) else name in given)) and point.is_on()
        ]

    def add_caching_hooks(
        self, names_filter: NamesFilter = None, incl_bwd: bool = False, device: DeviceType = None,
        remove_batch_dim: bool = False, cache: dict[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Attach hooks that keep activations of all calls to come."""
        cache, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, cache)
        for dir, pairs in (("fwd", fwd), ("bwd", bwd)):
            for name, hook in pairs:
                self.hook_dict[name].add_hook(hook, dir)
        return cache

    def cache_all(
        self, cache: dict[str, Tensor] | None, incl_bwd: bool = False, device: DeviceType = None,
        remove_batch_dim: bool = False,
    ) -> None:  # fmt: skip
        """`add_caching_hooks` for all points; deprecated in 2.x."""
        self.add_caching_hooks(None, incl_bwd, device, remove_batch_dim, cache)

    def cache_some(
        self, cache: dict[str, Tensor] | None, names: Callable[[str], bool], incl_bwd: bool = False,
        device: DeviceType = None, remove_batch_dim: bool = False,
    ) -> None:  # fmt: skip
        """`add_caching_hooks` for some points; deprecated in 2.x."""
        self.add_caching_hooks(names, incl_bwd, device, remove_batch_dim, cache)


def _position_axis(point: HookPoint) -> int:
    """The axis that tokens stand along, from the end."""
    if point.site is not None:
        axes = point.site.axes
        return next((axes.index(axis) - len(axes) for axis in _POSITIONS if axis in axes), -len(axes) - 9)
    return -3 if (point.name or "").endswith(_PER_HEAD) else -2
