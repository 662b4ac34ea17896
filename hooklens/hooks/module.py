"""The base class of every module with hook points: attaching, capturing, calling."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from hooklens.arguments import read_flag, read_function, read_one_of, reads, refusal
from hooklens.errors import HookLensError, HookNameError, InputError
from hooklens.hooks.arguments import CAPTURING, LISTENING, HookList, read_edits, read_pairs
from hooklens.hooks.call import (
    Call,
    Direction,
    Hook,
    HookFunction,
    HookHandle,
    Listeners,
    Listening,
    ListeningBlock,
    join_listeners,
    read_form,
    run_listening,
)
from hooklens.hooks.capture import Capture
from hooklens.hooks.choice import Choice
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.point import HookPoint
from hooklens.hooks.region import place_query_heads
from hooklens.hooks.splice import Splice, SplicedBlock, SpliceHook, naming
from hooklens.hooks.tree import HookPointTree

Hooked = TypeVar("Hooked", bound="HookedModule")


class HookedModule(HookPointTree):
    """A module whose hook points can be listed, hooked, edited and captured.

    Any module can derive from this class. Its hook points need no set-up: they take the name of the
    attribute path that leads to them.
    """

    def find_edit_points(self, edit: Edit, *, idle: Collection[str] = frozenset()) -> dict[str, HookPoint]:
        """The hook points at which an edit acts, by name.

        These are the ones it names; with `query_head`, for keys and values that query heads share, the ones where each
        query head has its own copy.

        Raises:
            HookNameError: the edit names no hook point, or none that fires.
            EditError: it names query heads where there are none.
        """
        if not isinstance(edit, Edit):
            raise refusal(edit, "the edit", "a value from hooklens.edits", InputError)
        points = self._find_points(edit.name, idle)
        if edit.query_head is None:
            return points
        known = self._hook_point_table().points
        names = place_query_heads(list(points), known, f"edit {type(edit).__name__}({edit.name!r})")
        return {name: known[name] for name in names}

    def _find_points(self, name: NamesFilter | HookPoint, idle: Collection[str] = frozenset()) -> dict[str, HookPoint]:
        if name is None:
            raise HookNameError("add_hook: no hook point named; give a name, a glob ('*' is everything) or a predicate")
        if isinstance(name, HookPoint):
            return {self._hook_point_table().name_of(name): name}
        return self.select_hook_points(name, idle=idle)

    @reads(
        fn=partial(read_function, expected="a function fn(tensor, hook)"),
        dir=partial(read_one_of, options=("fwd", "bwd")),
        prepend=read_flag,
        is_permanent=read_flag,
    )
    def add_hook(
        self,
        name: NamesFilter | HookPoint,
        fn: HookFunction,
        *,
        dir: Direction = "fwd",
        prepend: bool = False,
        is_permanent: bool = False,
    ) -> HookHandle:
        """Attach `fn(tensor, hook)` to every hook point that `name` selects, for all calls to come.

        Args:
            name: a hook name, or anything that selects names.
            fn: `fn(tensor, hook)`, where `hook` is the hook point, or `fn(tensor)`. It returns None to keep the tensor
                (or its in-place edit), or one of the same shape, dtype and device to replace it.
            dir: `"fwd"`, or `"bwd"` for gradients.
            prepend: run before the hooks already there.
            is_permanent: survive `reset_hooks`.

        Returns:
            A handle with `remove()`, which is also a context manager.

        Raises:
            HookNameError: `name` selects nothing.
        """
        form = read_form(fn, else_form="point")
        hooks = [
            (point, Hook(fn, point.called(called), permanent=is_permanent, form=form))
            for called, point in self._find_points(name).items()
        ]
        removals = [point.attach(hook, dir=dir, prepend=prepend).remove for point, hook in hooks]
        return HookHandle(removals)

    @reads(is_permanent=read_flag)
    def add_edit(self, edit: Edit, *, is_permanent: bool = False) -> HookHandle:
        """Attach an edit to the hook points it names; it then acts in every call.

        Raises:
            HookNameError: the edit names no hook point.
            EditError: it names query heads where there are none.
        """
        return HookHandle(
            [
                point.attach(_EditHook(edit, point.called(name), permanent=is_permanent)).remove
                for name, point in self.find_edit_points(edit).items()
            ]
        )

    def list_hooks(self, names_filter: NamesFilter = None) -> dict[str, list[object]]:
        """What `add_hook` and `add_edit` attached, by hook point: functions and edits, backward ones last.

        Args:
            names_filter: which hook points; None: all, those on request, too.

        Raises:
            HookNameError: some part of the filter selects nothing.
        """
        attached = {}
        for name, point in self.select_hook_points("*" if names_filter is None else names_filter).items():
            if point.own is not None:
                attached[name] = [hook.source for hook in (*point.own.hooks, *point.own.gradient_hooks)]
        return attached

    @reads(
        dir=partial(read_one_of, options=("fwd", "bwd", "both")),
        including_permanent=read_flag,
        clear_contexts=read_flag,
    )
    def reset_hooks(
        self,
        *,
        dir: Direction | Literal["both"] = "both",
        including_permanent: bool = False,
        clear_contexts: bool = True,
    ) -> None:
        """Remove what `add_hook` attached, and empty the points' `ctx` dictionaries."""
        for point in self._hook_point_table().points.values():
            point.remove_hooks(dir=dir, including_permanent=including_permanent)
            if clear_contexts:
                point.ctx.clear()

    def listen(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        *,
        splices: Sequence[Splice] = (),
        idle: Collection[str] = frozenset(),
    ) -> Listeners:
        """Hooks, edits and splices as listeners, which a call or a `with` block takes.

        The points of splices have to be named already, see `hooklens.hooks.splice.naming`.

        Args:
            fwd_hooks, bwd_hooks, edits, splices: as in `hooks`.
            idle: names of points that do not fire in the call to come.

        Raises:
            HookNameError: lists every filter that selects nothing, or nothing that fires.
            EditError: an edit names query heads where there are none.
        """
        hooks = {"fwd": read_pairs(fwd_hooks, what="fwd_hooks"), "bwd": read_pairs(bwd_hooks, what="bwd_hooks")}
        edits = read_edits(edits)
        if not (fwd_hooks or bwd_hooks or edits or splices):
            return {}
        made: dict[HookPoint, Listening] = {}
        problems: list[str] = []
        for direction, pairs in hooks.items():
            for filter_, fn in pairs:
                try:
                    points = self._find_points(filter_, idle)
                except HookNameError as error:
                    problems.append(str(error))
                    continue
                form = read_form(fn, else_form="point")
                for name, point in points.items():
                    at = made.setdefault(point, Listening())
                    hook = Hook(fn, point.called(name), form=form)
                    (at.hooks if direction == "fwd" else at.gradient_hooks).append(hook)
        for edit in edits:
            try:
                places = self.find_edit_points(edit, idle=idle)
            except HookNameError as error:
                problems.append(str(error))
                continue
            for name, point in places.items():
                made.setdefault(point, Listening()).hooks.append(_EditHook(edit, point.called(name)))
        for point, hook in self._splice_hooks(splices, idle, problems):
            made.setdefault(point, Listening()).hooks.append(hook)
        if problems:
            raise HookNameError("; ".join(dict.fromkeys(problems)))
        return made

    def _splice_hooks(
        self, splices: Sequence[Splice], idle: Collection[str], problems: list[str]
    ) -> Iterator[tuple[HookPoint, SpliceHook]]:
        """What splices do at which points; names that select nothing go to the problems."""
        for splice in splices:
            splice.check(self)
            for name, fn in splice.start():
                try:
                    places = self._find_points(name, idle)
                except HookNameError as error:
                    problems.append(str(error))
                    continue
                for point in places.values():
                    yield point, SpliceHook(fn, point, splice)

    @reads(**LISTENING)
    def hooks(
        self: Hooked,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        splices: Sequence[Splice] = (),
    ) -> "ListeningBlock[Hooked]":
        """Hooks for all calls that the thread makes inside a `with` block.

        Other threads and hook functions are outside of it. A generator that yields inside the block leaves it open for
        whoever asked it, too, until it goes on.

        Args:
            fwd_hooks: pairs (name or filter, function).
            bwd_hooks: the same for gradients; they fall silent on leaving the block.
            edits: values from `hooklens.edits`; they act after `fwd_hooks`.
            splices: sparse autoencoders and the like (`sae.at(name)`); they act after `edits`. Their hook points are
                named inside the block.
        """
        if splices:
            return SplicedBlock(lambda: self.listen(fwd_hooks, bwd_hooks, edits, splices=splices), self, self, splices)
        return ListeningBlock(lambda: self.listen(fwd_hooks, bwd_hooks, edits), self)

    @reads(**CAPTURING)
    def capture(
        self,
        names_filter: NamesFilter = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pos_slice: Choice = None,
        incl_bwd: bool = False,
    ) -> ListeningBlock[dict[str, Tensor]]:
        """Capture what passes the selected hook points in calls that the thread makes inside a `with` block.

        Returns:
            A context manager that gives the tensors by hook name, filled as the model runs; with `incl_bwd`
            gradients, too, under `"<name>_grad"`, once a backward pass has run inside the block.

        Raises:
            HookNameError: the filter selects nothing.
        """
        capture = Capture(
            self.select_hook_points(names_filter), device=device, dtype=dtype, pos_slice=pos_slice, incl_bwd=incl_bwd
        )
        return ListeningBlock(lambda: capture.listeners, capture.tensors)

    @reads(**LISTENING)
    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        splices: Sequence[Splice] = (),
        **forward_keywords: Any,
    ) -> Any:
        """Call the model with hooks for this call; other keywords go to `forward`.

        Backward hooks act in every backward pass from the output, also later ones.
        """
        require_gradients(bwd_hooks, "bwd_hooks")
        with naming(self, splices):
            listeners = self.listen(fwd_hooks, bwd_hooks, edits, splices=splices)
        return run_listening(listeners, self, *args, **forward_keywords)

    @reads(**LISTENING, **CAPTURING)
    def run_with_cache(
        self,
        *args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        incl_bwd: bool = False,
        pos_slice: Choice = None,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        edits: Sequence[Edit] = (),
        splices: Sequence[Splice] = (),
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
            fwd_hooks, bwd_hooks, edits, splices: as in `hooks`, for this call.
            **forward_keywords: keywords of `forward`.

        Returns:
            The output, and the tensors by hook name.

        Raises:
            HookNameError: some part of the filter selects nothing.
            HookLensError: `incl_bwd` with an output that is no scalar.
        """
        require_gradients(incl_bwd or bwd_hooks, "incl_bwd" if incl_bwd else "bwd_hooks")
        with naming(self, splices):
            points = self.select_hook_points(names_filter)
            own = self.listen(fwd_hooks, bwd_hooks, edits, splices=splices)
        capture = Capture(points, device=device, dtype=dtype, pos_slice=pos_slice, incl_bwd=incl_bwd)
        listeners = join_listeners([own, capture.listeners])
        output = run_listening(listeners, self, *args, **forward_keywords)
        if incl_bwd:
            run_backward(output, capture)
        return output, capture.tensors


class _EditHook(Hook):
    """An edit as a hook, which asks the call what tokens run."""

    __slots__ = ("edit",)

    def __init__(self, edit: Edit, point: HookPoint, *, permanent: bool = False) -> None:
        super().__init__(edit.apply, point, permanent=permanent, form="point")
        self.edit = edit

    @property
    def source(self) -> object:
        """The edit."""
        return self.edit

    def run(self, tensor: Tensor, call: Call) -> Tensor | None:
        """The edited tensor, or None."""
        return self.edit.apply(tensor, self.point, call.tokens)


def run_backward(output: object, capture: Capture) -> None:
    """Run backward from a scalar, for a capture that keeps gradients.

    Raises:
        HookLensError: the output is no scalar.
    """
    if not isinstance(output, Tensor) or output.numel() != 1:
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise HookLensError(f"incl_bwd runs backward from the output, which must be a scalar; got {found}")
    if output.requires_grad:
        output.backward()  # type: ignore[no-untyped-call]
    capture.fill_in_gradients()


def require_gradients(asked: object, what: str) -> None:
    """Refuse gradient listeners where autograd is off.

    Raises:
        HookLensError: `asked` is true and gradients are disabled.
    """
    if asked and (not torch.is_grad_enabled() or torch.is_inference_mode_enabled()):
        raise HookLensError(f"{what} needs gradients, which are disabled here: leave torch.no_grad / inference_mode")
