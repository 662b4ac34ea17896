"""A tree of modules that knows its hook points by name."""

from collections.abc import Collection
from typing import Any

from torch import nn

from hooklens.hooks.changes import count_changes, note_change
from hooklens.hooks.foreign import Placed, check_placed, outline, place
from hooklens.hooks.names import NamesFilter, select_names
from hooklens.hooks.point import HookPoint
from hooklens.hooks.splice import spliced_points


class HookPointTree(nn.Module):
    """A module that finds the hook points in it and selects some by name.

    Hook points and modules of this class are also kept in the instance's own dictionary: `nn.Module` finds them through
    `__getattr__`, at up to a microsecond a look-up, which a forward with hundreds of hook points would feel. Other
    modules are not: tools that replace a linear map do so behind the back of `setattr`.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_modules", {}).get(name)
        if before is not None and isinstance(value, nn.Module):
            self._check_place(name, value, before)
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self._note_submodule(name, value)
            if before is not None and before is not value:
                self._fit(name, value, before)
        elif before is not None:
            self._forget(name)

    def _fit(self, name: str, module: nn.Module, before: nn.Module) -> None:
        """Make a module fit into the place of another: of a point, or of a part of the network."""
        declared = self._displaced(name, before)
        if isinstance(module, HookPoint):
            if isinstance(declared, HookPoint):
                site = declared.site if module.site is None else module.site
                module.__dict__.update(site=site, shared=declared.shared, name=declared.name)
        elif self._is_placed(module, declared):
            # Its weights are not held: who put a module there has them, or needs them no more.
            declared = self.__dict__.setdefault("_displaced_by_name", {}).setdefault(name, outline(declared))
            place(module, declared)

    def _displaced(self, name: str, before: nn.Module) -> nn.Module:
        """What was built for a place; what stands there, where nothing has been put into it."""
        displaced: nn.Module = self.__dict__.get("_displaced_by_name", {}).get(name, before)
        return displaced

    def _is_placed(self, module: nn.Module, declared: nn.Module) -> bool:
        """Whether a module has to be made to fit into a place."""
        if isinstance(declared, HookPoint):
            return not isinstance(module, HookPoint)
        return self._takes_calls(declared) and not self._takes_calls(module)

    def _check_place(self, name: str, module: nn.Module, before: nn.Module) -> None:
        """Refuse a module that cannot stand in the place of another.

        Raises:
            HookLensError: says why.
        """
        declared = self._displaced(name, before)
        if self._is_placed(module, declared):
            check_placed(f"{type(self).__name__}.{name}", module, declared)

    @staticmethod
    def _takes_calls(module: nn.Module) -> bool:
        """Whether a module is called with the call, as parts of a network are."""
        return False

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self._forget(name)
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule, as `nn.Module.add_module` does."""
        super().add_module(name, module)
        if module is not None:
            self._note_submodule(name, module)

    def _note_submodule(self, name: str, module: nn.Module) -> None:
        self._forget(name)
        if isinstance(module, HookPointTree | HookPoint | Placed):
            self.__dict__[name] = module

    def _forget(self, name: str) -> None:
        self.__dict__.pop(name, None)
        note_change()

    @property
    def n_hooked_layers(self) -> int | None:
        """Number of blocks, for negative layers in shorthands; None where the module has no layers."""
        return None

    def hook_points(self) -> dict[str, HookPoint]:
        """All hook points by name, in the order of the module tree."""
        return dict(self._hook_point_table().points)

    def name_hook_points(self) -> None:
        """Give each hook point the name that it has here, to be called by the model that points belong to."""
        for name, point in self._hook_point_table().points.items():
            point.__dict__["name"] = name

    def _hook_point_table(self) -> "_HookPointTable":
        cached: _HookPointTable | None = self.__dict__.get("_hook_point_cache")
        if cached is None or not cached.is_current():
            cached = _HookPointTable(self)
            self.__dict__["_hook_point_cache"] = cached
        return cached

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: the table of hook points is made anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_hook_point_cache"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a state, in which modules of others are what they were."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name, declared in self.__dict__.get("_displaced_by_name", {}).items():
            module = self._modules.get(name)
            if module is not None and self._is_placed(module, declared):
                place(module, declared)

    def select_hook_points(
        self, names_filter: NamesFilter, *, idle: Collection[str] = frozenset()
    ) -> dict[str, HookPoint]:
        """The hook points a filter selects, by name; see `hooklens.hooks.select_names`.

        Args:
            names_filter: which.
            idle: names of points that do not fire in the call to come; a filter of several names passes over them.

        Raises:
            HookNameError: some part of the filter selects nothing, or nothing that fires.
        """
        table = self._hook_point_table()
        if spliced := spliced_points(self):
            known = {**table.points, **spliced}
            names = select_names(names_filter, known, n_layers=self.n_hooked_layers, idle=idle)
            return {name: known[name] for name in names}
        if idle or not (names_filter is None or isinstance(names_filter, str)):
            names = select_names(names_filter, table.points, n_layers=self.n_hooked_layers, idle=idle)
            return {name: table.points[name] for name in names}
        if names_filter not in table.selections:
            names = select_names(names_filter, table.points, n_layers=self.n_hooked_layers)
            table.selections[names_filter] = {name: table.points[name] for name in names}
        return table.selections[names_filter]


class _HookPointTable:
    """The hook points of a module tree by name, and what tells that the tree has changed since.

    A `HookPointTree` counts its changes. Plain modules in the tree do not, so their children are compared.

    Attributes:
        points: by name.
        selections: what filters that are text select, as they were asked for.
    """

    def __init__(self, root: HookPointTree) -> None:
        modules = dict(root.named_modules())
        self.points: dict[str, HookPoint] = {
            name: module for name, module in modules.items() if isinstance(module, HookPoint)
        }
        self.selections: dict[str | None, dict[str, HookPoint]] = {}
        self._version = count_changes()
        self._plain = [
            (module._modules, tuple(module._modules.items()))
            for module in modules.values()
            if not isinstance(module, HookPointTree | HookPoint) and module._modules
        ]

    def is_current(self) -> bool:
        """Whether the tree is as it was when the table was made."""
        return self._version == count_changes() and all(tuple(now.items()) == then for now, then in self._plain)

    def name_of(self, point: HookPoint) -> str:
        """The name of a point here; of one from elsewhere its own."""
        return next((name for name, known in self.points.items() if known is point), point.name or "")
