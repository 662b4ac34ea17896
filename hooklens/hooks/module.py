"""The base class of every module with hook points: finding, attaching, capturing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from hooklens.errors import HookLensError, HookNameError
from hooklens.hooks.capture import Capture
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter, select_names
from hooklens.hooks.point import Direction, HookFunction, HookHandle, HookPoint
from hooklens.hooks.pos_slice import PosSlice
from hooklens.hooks.selection import TokenIndex, place_query_heads

HookList = Sequence[tuple[NamesFilter, HookFunction]]

# Counts changes to any module tree, so that a model's table of hook points is made once and stays true.
_tree_version = 0


class HookedModule(nn.Module):
    """A module whose hook points can be listed, hooked, edited and captured.

    Submodules are also kept in the instance's own dictionary: `nn.Module` finds them through `__getattr__`,
    at up to a microsecond a look-up, which a forward with hundreds of hook points would feel.

    Any module can derive from this class. Its hook points need no set-up: they take the name of the
    attribute path that leads to them.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        was_submodule = name in self.__dict__.get("_modules", ())
        super().__setattr__(name, value)
        if isinstance(value, nn.Module):
            self._note_submodule(name, value)
        elif was_submodule:
            self.__dict__.pop(name, None)
            self._note_change()

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            self.__dict__.pop(name, None)
            self._note_change()
        super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a submodule, as `nn.Module.add_module` does."""
        super().add_module(name, module)
        if module is not None:
            self._note_submodule(name, module)

    def _note_submodule(self, name: str, module: nn.Module) -> None:
        self.__dict__[name] = module
        self._note_change()

    @staticmethod
    def _note_change() -> None:
        global _tree_version  # noqa: PLW0603
        _tree_version += 1

    @property
    def n_hooked_layers(self) -> int | None:
        """Number of blocks, for negative layers in shorthands; None where the module has no layers."""
        return None

    def running_tokens(self) -> TokenIndex | None:
        """Which tokens the call in progress runs; None outside a call, and where there are no tokens."""
        return None

    def hook_points(self) -> dict[str, HookPoint]:
        """All hook points by name, in the order of the module tree."""
        table = self._hook_point_table()
        return dict(table)

    def _hook_point_table(self) -> dict[str, HookPoint]:
        cached: _HookPointTable | None = self.__dict__.get("_hook_point_cache")
        if cached is None or not cached.is_current():
            cached = _HookPointTable(self)
            self.__dict__["_hook_point_cache"] = cached
            self.__dict__["_selection_cache"] = {}
        return cached.points

    def __getstate__(self) -> dict[str, Any]:
        """The state to copy or pickle: the table of hook points is made anew."""
        made_anew = ("_hook_point_cache", "_selection_cache")
        return {name: value for name, value in self.__dict__.items() if name not in made_anew}

    def select_hook_points(self, names_filter: NamesFilter) -> list[HookPoint]:
        """The hook points a filter selects; see `hooklens.hooks.select_names`.

        Raises:
            HookNameError: some part of the filter selects nothing.
        """
        table = self._hook_point_table()
        selections: dict[str | None, list[HookPoint]] = self.__dict__["_selection_cache"]
        if names_filter is None or isinstance(names_filter, str):
            if names_filter not in selections:
                names = select_names(names_filter, table, n_layers=self.n_hooked_layers)
                selections[names_filter] = [table[name] for name in names]
            return selections[names_filter]
        return [table[name] for name in select_names(names_filter, table, n_layers=self.n_hooked_layers)]

    def find_edit_points(self, edit: Edit) -> list[HookPoint]:
        """The hook points at which an edit acts.

        These are the ones it names; with `query_head`, for keys and values that query heads share, the ones where each
        query head has its own copy.

        Raises:
            HookNameError: the edit names no hook point.
            EditError: it names query heads where there are none.
        """
        points = self._find_points(edit.name)
        if edit.query_head is None:
            return points
        table = self._hook_point_table()
        names = [point.name or "" for point in points]
        return [table[name] for name in place_query_heads(names, table, f"edit {type(edit).__name__}({edit.name!r})")]

    def _find_points(self, name: NamesFilter | HookPoint) -> list[HookPoint]:
        if name is None:
            raise HookNameError("add_hook: no hook point named; give a name, a glob ('*' is everything) or a predicate")
        return [name] if isinstance(name, HookPoint) else self.select_hook_points(name)

    def add_hook(
        self,
        name: NamesFilter | HookPoint,
        fn: HookFunction,
        *,
        dir: Direction = "fwd",
        prepend: bool = False,
        is_permanent: bool = False,
    ) -> HookHandle:
        """Attach `fn(tensor, hook)` to every hook point that `name` selects.

        Args:
            name: a hook name, or anything that selects names.
            fn: returns None to keep the tensor (or its in-place edit), or a tensor to replace it.
            dir: `"fwd"`, or `"bwd"` for gradients.
            prepend: run before the hooks already there.
            is_permanent: survive `reset_hooks`.

        Returns:
            A handle with `remove()`, which is also a context manager.

        Raises:
            HookNameError: `name` selects nothing.
        """
        points = self._find_points(name)
        removals = [point.add_hook(fn, dir=dir, prepend=prepend, is_permanent=is_permanent).remove for point in points]
        return HookHandle(removals)

    def add_edit(self, edit: Edit, *, is_permanent: bool = False) -> HookHandle:
        """Attach an edit to the hook points it names; it then acts in every call.

        Raises:
            HookNameError: the edit names no hook point.
            EditError: it names query heads where there are none.
        """
        if not isinstance(edit, Edit):
            raise HookLensError(f"an edit is a value from hooklens.edits, got {type(edit).__name__}")
        hook = _EditHook(edit, self)
        points = self.find_edit_points(edit)
        return HookHandle([point.add_hook(hook, is_permanent=is_permanent).remove for point in points])

    def reset_hooks(
        self,
        *,
        dir: Direction | Literal["both"] = "both",
        including_permanent: bool = False,
        clear_contexts: bool = True,
    ) -> None:
        """Remove hooks from all hook points, and empty their `ctx` dictionaries."""
        for point in self._hook_point_table().values():
            point.remove_hooks(dir=dir, including_permanent=including_permanent)
            if clear_contexts:
                point.ctx.clear()

    @contextmanager
    def hooks(
        self, fwd_hooks: HookList = (), bwd_hooks: HookList = (), edits: Sequence[Edit] = ()
    ) -> Iterator["HookedModule"]:
        """Hooks that last as long as the `with` block, and are removed on any exception.

        Args:
            fwd_hooks: pairs (name or filter, function).
            bwd_hooks: the same for gradients.
            edits: values from `hooklens.edits`; they act after `fwd_hooks`.
        """
        with ExitStack() as stack:
            try:
                for direction, pairs in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                    for name, fn in _checked_pairs(pairs, direction):
                        stack.enter_context(self.add_hook(name, fn, dir=direction))  # type: ignore[arg-type]
                for edit in edits:
                    stack.enter_context(self.add_edit(edit))
            except HookNameError as error:
                self._list_unknown(
                    [pair[0] for pair in (*fwd_hooks, *bwd_hooks)] + [edit.name for edit in edits], error
                )
            yield self

    def _list_unknown(self, filters: Sequence[NamesFilter | HookPoint], first: HookNameError) -> NoReturn:
        """Raise an error about every filter that selects nothing, where there are several."""
        texts: list[str] = []
        for names_filter in filters:
            try:
                if names_filter is not None and not isinstance(names_filter, HookPoint):
                    self.select_hook_points(names_filter)
            except HookNameError as error:
                texts.append(str(error))
        raise first if len(texts) < 2 else HookNameError("; ".join(dict.fromkeys(texts)))

    @contextmanager
    def capture(
        self,
        names_filter: NamesFilter = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos_slice: PosSlice = None,
        incl_bwd: bool = False,
    ) -> Iterator[dict[str, Tensor]]:
        """Capture what passes the selected hook points while the `with` block runs.

        Yields:
            The tensors by hook name, filled as the model runs; with `incl_bwd` gradients, too, under
            `"<name>_grad"`, once a backward pass has run inside the block.

        Raises:
            HookNameError: the filter selects nothing.
        """
        points = self.select_hook_points(names_filter)
        capture = Capture(device=device, dtype=dtype, pos_slice=pos_slice)
        with ExitStack() as stack:
            if incl_bwd:
                # Registered first: a gradient hook sees the tensor that goes on, and so does the capture.
                def keep_gradient(gradient: Tensor, hook: HookPoint) -> None:
                    capture.add(f"{hook.name}_grad", gradient, like=hook.name)

                for point in points:
                    stack.enter_context(point.add_hook(keep_gradient, dir="bwd"))
            attached: list[HookPoint] = []
            try:
                for point in points:
                    point.add_capture(capture)
                    attached.append(point)
                yield capture.tensors
            finally:
                for point in attached:
                    point.remove_capture(capture)

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        **forward_keywords: Any,
    ) -> Any:
        """Call the model with hooks that last for this call; other keywords go to `forward`."""
        require_gradients(bwd_hooks, "bwd_hooks")
        with self.hooks(fwd_hooks, bwd_hooks, edits):
            return self(*args, **forward_keywords)

    def run_with_cache(
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        incl_bwd: bool = False,
        pos_slice: PosSlice = None,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        **forward_keywords: Any,
    ) -> tuple[Any, Mapping[str, Tensor]]:
        """Call the model and keep activations by hook name; other keywords go to `forward`.

        Args:
            *args: what `forward` takes.
            names_filter: which activations, see `select_hook_points`.
            device: where to keep them; None: where they are, uncopied.
            dtype: what to keep them in; None: their own.
            incl_bwd: also run backward from the output, which must be a scalar, and keep gradients under
                `"<name>_grad"`.
            pos_slice: positions to keep, at points whose axes are known.
            fwd_hooks: pairs (name or filter, function) that last for this call.
            bwd_hooks: the same for gradients.
            edits: values from `hooklens.edits`.
            **forward_keywords: keywords of `forward`.

        Returns:
            The output, and the tensors by hook name.

        Raises:
            HookNameError: some part of the filter selects nothing.
            HookLensError: `incl_bwd` with an output that is no scalar.
        """
        require_gradients(incl_bwd or bwd_hooks, "incl_bwd" if incl_bwd else "bwd_hooks")
        with (
            self.hooks(fwd_hooks, bwd_hooks, edits),
            self.capture(names_filter, device=device, dtype=dtype, pos_slice=pos_slice, incl_bwd=incl_bwd) as captured,
        ):
            output = self(*args, **forward_keywords)
            if incl_bwd:
                if not isinstance(output, Tensor) or output.numel() != 1:
                    found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
                    raise HookLensError(f"incl_bwd runs backward from the output, which must be a scalar; got {found}")
                output.backward()  # type: ignore[no-untyped-call]
        return output, captured


class _HookPointTable:
    """The hook points of a module tree by name, and what tells that the tree has changed since.

    A `HookedModule` counts its changes. Plain modules in the tree do not, so their children are compared.
    """

    def __init__(self, root: HookedModule) -> None:
        modules = dict(root.named_modules())
        self.points = {name: module for name, module in modules.items() if isinstance(module, HookPoint)}
        for name, point in self.points.items():
            point.__dict__["name"] = name
        self._version = _tree_version
        self._plain = [
            (module._modules, tuple(module._modules.items()))
            for module in modules.values()
            if not isinstance(module, HookedModule | HookPoint)
        ]

    def is_current(self) -> bool:
        """Whether the tree is as it was when the table was made."""
        return self._version == _tree_version and all(tuple(now.items()) == then for now, then in self._plain)


class _EditHook:
    """An edit as a hook of a module, which it asks what tokens run; in a copy of the module it asks the copy."""

    def __init__(self, edit: Edit, module: HookedModule) -> None:
        self.edit = edit
        self.module = module

    def __call__(self, tensor: Tensor, hook: HookPoint) -> Tensor | None:
        return self.edit.apply(tensor, hook, self.module.running_tokens())

    def __deepcopy__(self, memo: dict[int, Any]) -> "_EditHook":
        return _EditHook(self.edit, memo.get(id(self.module), self.module))


def require_gradients(asked: object, what: str) -> None:
    """Refuse gradient listeners where autograd is off.

    Raises:
        HookLensError: `asked` is true and gradients are disabled.
    """
    if asked and (not torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
        raise HookLensError(f"{what} needs gradients, which are disabled here: leave torch.no_grad / inference_mode")


def _checked_pairs(pairs: HookList, direction: str) -> list[tuple[NamesFilter, Callable[..., Tensor | None]]]:
    wrong = [pair for pair in pairs if not (isinstance(pair, tuple | list) and len(pair) == 2 and callable(pair[1]))]
    if wrong:
        raise HookNameError(f"{direction}_hooks takes pairs (name or filter, function); got {wrong[0]!r}")
    return [(pair[0], pair[1]) for pair in pairs]
