"""A hook point with the methods of TransformerLens 2.x, and its hooks, which know their level."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from hooklens import hooks
from hooklens.hooks.call import Call, Hook

# "fwd", "bwd" or, where hooks are removed, "both".
Dir = Any
HookFunction = Callable[..., Any]


class LensHandle(Hook):
    """A hook with its level; that of a point which a setting turns off (`use_attn_result`) is silent meanwhile."""

    __slots__ = ("context_level", "dir")

    def __init__(
        self, fn: HookFunction, point: "HookPoint", *, dir: str = "fwd", permanent: bool = False,
        level: int | None = None,
    ) -> None:  # fmt: skip
        # 2.x calls every hook so.
        super().__init__(fn, point, permanent=permanent, form="hook=")
        self.dir, self.context_level = dir, level

    # PyTorch hands backward hooks to the graph in the forward pass: they act in it, though they are removed since.
    removed = property(lambda self: False, lambda self, value: None)

    @property
    def is_permanent(self) -> bool:
        """Whether `reset_hooks` leaves it."""
        return self.permanent

    @property
    def user_hook(self) -> HookFunction:
        """The function."""
        return self.fn

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
        self,
        hook: HookFunction,
        dir: Dir = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Attach `hook(tensor, hook=point)`."""
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"Invalid direction {dir}")
        self.attach(LensHandle(hook, self, dir=dir, permanent=is_permanent, level=level), dir=dir, prepend=prepend)

    # By position or by name takes all that by name alone does; pyright says otherwise.
    def remove_hooks(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, dir: Dir = "fwd", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """Remove the hooks of a direction and level; of all levels where permanent ones go, too."""
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"Invalid direction {dir}")

        def stays(hook: Hook) -> bool:
            is_of_level = level is None or getattr(hook, "context_level", None) == level
            return not including_permanent and (hook.permanent or not is_of_level)

        self._keep_hooks(stays, dir=dir)

    def has_hooks(self, dir: Dir = "both", including_permanent: bool = True, level: int | None = None) -> bool:
        """Whether there are hooks of a direction and level."""
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"Invalid direction {dir}")
        return bool(self.select_hooks(dir, including_permanent, level))

    def select_hooks(self, dir: Dir = "both", including_permanent: bool = True, level: int | None = None) -> list[Any]:
        """The hooks of a direction and level."""
        return [
            one
            for one in [*(self.fwd_hooks if dir != "bwd" else ()), *(self.bwd_hooks if dir != "fwd" else ())]
            if (including_permanent or not one.is_permanent) and (level is None or one.context_level == level)
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
