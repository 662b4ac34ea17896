"""Layers shared by several processes: a pipeline of stages, each a run of blocks that one process has.

A stage runs in its own process, and all others are told what leaves it, and what passes its hook points where somebody
listens. There they show it to their own listeners: so every process sees every activation, as if it had run all blocks,
and hook functions run everywhere. What an edit makes counts in the process that has the block; it is the same in all.

To autograd a stage is one function, in every process: backward its own process goes through the blocks, and tells the
others the gradient of what entered and, where somebody listens to gradients, those inside. So all processes go through
one and the same graph, whatever part of it a gradient takes.

One stage computes at a time.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hooklens.errors import HookLensError
from hooklens.hooks.call import Call, Hook, Listening, run_apart
from hooklens.hooks.point import HookPoint, join_listening
from hooklens.hooks.spread import Relay, tap_alike
from hooklens.parallel.rows import OwnRows
from hooklens.parallel.spread import GradientSums
from hooklens.parallel.wire import DONE, FAILED, FIRED, GRADIENT, Wire

if TYPE_CHECKING:
    from torch import nn


class Awaited(NamedTuple):
    """A gradient that somebody waits for, of what passed a hook point in a stage.

    Attributes:
        hooks: who does.
        call: the call.
    """

    hooks: Sequence[Hook]
    call: Call


class StageRun(Relay):
    """One run of a stage, in one process.

    Args:
        wire: to the other processes.
        stage: the place in the group of the process that has the blocks.
        is_own: it is this process.
        points: the network's hook points, in an order that all processes have.
        call: who listens.
        rows: the rows of the batch that this process runs; None: all.
        sums: the parameters whose gradients are summed over processes.
    """

    def __init__(
        self,
        wire: Wire,
        stage: int,
        points: Sequence[HookPoint],
        call: Call,
        rows: OwnRows | None,
        sums: GradientSums,
        *,
        is_own: bool,
    ) -> None:
        self.wire, self.stage, self.is_own, self.points, self.rows = wire, stage, is_own, points, rows
        self.call, self.sums = call, sums
        self.awaited: list[Awaited] = []
        self._numbers = {id(point): number for number, point in enumerate(points)}
        self._traces = torch.is_grad_enabled()
        self._within: tuple[Tensor, Tensor] | None = None
        self._goes_back = False

    def run(self, blocks: Callable[[Tensor, Call], Tensor], stream: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The stream that leaves the stage, in every process.

        Args:
            blocks: runs the blocks, in their own process.
            stream: what enters.
            parameters: of the blocks, in their own process those that are trained.
        """
        if not self._traces:
            return self._run_own(blocks, stream) if self.is_own else self._follow()
        # So that the function is part of the graph in every process.
        anchor = torch.zeros((), requires_grad=True)
        left: Tensor = _Stage.apply(self, blocks, anchor, stream, *parameters)  # type: ignore[no-untyped-call]
        return left

    def fire(self, point: HookPoint, tensor: Tensor, call: Call, listening: Listening) -> tuple[Tensor, bool]:
        """In the stage's own process: tell the others what passes, and show it to the listeners here."""
        whole = tensor if self.rows is None else self.rows.gather(tensor)
        number = self._numbers.get(id(point))
        if number is not None:
            self.wire.send(self.stage, FIRED, number, whole)
        left, changed = self._show(point, whole, call, listening)
        return (left if self.rows is None else tap_alike(self.rows.take(left), left)), changed

    def _show(self, point: HookPoint, whole: Tensor, call: Call, listening: Listening) -> tuple[Tensor, bool]:
        if not (self._traces and listening.gradient_hooks):
            return point.fire(whole, call, listening)
        left = point.fire(whole, call, Listening(listening.hooks))[0] if listening.hooks else whole
        if left.is_floating_point():
            left = left.view_as(left) if left.requires_grad else left.detach().requires_grad_()
            number = len(self.awaited)
            self.awaited.append(Awaited(listening.gradient_hooks, call))
            if self.is_own:
                left.register_hook(lambda gradient: self.wire.send(self.stage, GRADIENT, number, gradient))  # type: ignore[no-untyped-call]
                left = point.fire(left, call, Listening((), listening.gradient_hooks))[0]
        for watcher in listening.watchers:
            watcher.keep(left, point, call)
        return left, True

    def _run_own(self, blocks: Callable[[Tensor, Call], Tensor], stream: Tensor) -> Tensor:
        try:
            left = blocks(stream, self.call.through(self))
        except BaseException:
            # The others wait for word.
            self.wire.send(self.stage, FAILED)
            raise
        self.wire.send(self.stage, DONE, tensor=left)
        return left

    def _follow(self) -> Tensor:
        """Show the listeners of this process what passes in the stage's own; what leaves it."""
        problem: BaseException | None = None
        while True:
            kind, number, tensor = self.wire.receive(self.stage)
            if kind == FIRED and problem is None and tensor is not None:
                point = self.points[number]
                listening = join_listening(point.own, self.call.listeners.get(point))
                try:
                    if listening:
                        self._show_received(point, tensor, listening)
                except BaseException as error:
                    # The messages that follow are waited for all the same: the other process goes on sending them.
                    problem = error
            elif kind == FAILED:
                raise problem or HookLensError(
                    "a stage of the pipeline broke off in another process; its error says why"
                )
            elif kind == DONE and tensor is not None:
                if problem is not None:
                    raise problem
                return tensor

    def _show_received(self, point: HookPoint, tensor: Tensor, listening: Listening) -> None:
        with torch.set_grad_enabled(self._traces):
            if self._traces and tensor.is_floating_point():
                # As in its own process, it has a gradient, and can be edited in place.
                tensor = tensor.requires_grad_().clone()
            self._show(point, tensor, self.call, listening)

    def make_graph(self, blocks: Callable[[Tensor, Call], Tensor], stream: Tensor) -> Tensor:
        """What leaves the stage, without a graph; in its own process the graph is kept here."""
        if not self.is_own:
            return self._follow()
        with torch.enable_grad():
            entered = stream.detach().requires_grad_()
            entered.register_hook(self._check_way)  # type: ignore[no-untyped-call]
            left = self._run_own(blocks, entered)
        self._within = entered, left
        return left.detach()

    def _check_way(self, gradient: Tensor) -> None:
        if not self._goes_back:
            raise HookLensError(
                "a gradient goes through a tensor that a hook function kept from inside a stage of the pipeline, and "
                "would end where the stage begins. Take gradients where the activation is (a backward hook, or "
                "run_with_cache with incl_bwd=True), or share the network otherwise (tensor=, fully_sharded=)"
            )

    def backward(self, parameters: Sequence[Tensor], gradient: Tensor) -> Sequence[Tensor | None]:
        """The gradients of what entered and, in the stage's own process, of its parameters."""
        if not self.is_own:
            return self._follow_back()
        assert self._within is not None
        entered, left = self._within
        wanted = [entered, *parameters]
        self._goes_back = True
        try:
            entering, *own = torch.autograd.grad(left, wanted, gradient, allow_unused=True, retain_graph=True)
            own = [self.sums.take(parameter, one) for parameter, one in zip(parameters, own, strict=True)]
        except BaseException:
            self.wire.send(self.stage, FAILED)
            raise
        finally:
            self._goes_back = False
        entering = torch.zeros_like(entered) if entering is None else entering
        self.wire.send(self.stage, DONE, tensor=entering)
        return [entering, *own]

    def _follow_back(self) -> list[Tensor | None]:
        problem: BaseException | None = None
        while True:
            kind, number, tensor = self.wire.receive(self.stage)
            if kind == GRADIENT and problem is None and tensor is not None:
                awaited = self.awaited[number]
                try:
                    for hook in awaited.hooks:
                        if not hook.removed:
                            run_apart(hook.run, tensor, awaited.call)
                except BaseException as error:
                    problem = error
            elif kind == FAILED:
                raise problem or HookLensError(
                    "a stage of the pipeline broke off in another process; its error says why"
                )
            elif kind == DONE:
                if problem is not None:
                    raise problem
                return [tensor]


class _Stage(torch.autograd.Function):
    """A run of a stage, as one function."""

    @staticmethod
    def forward(ctx: Any, run: StageRun, blocks: Any, anchor: Tensor, stream: Tensor, *parameters: Tensor) -> Any:
        ctx.run, ctx.parameters = run, parameters
        return run.make_graph(blocks, stream)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        of_stream, *of_parameters = ctx.run.backward(ctx.parameters, gradients[0])
        return None, None, None, of_stream, *of_parameters


def share_layers(n_layers: int, n_stages: int) -> list[range]:
    """The layers of each stage: equally many, the first ones one more where that does not go."""
    each, more = divmod(n_layers, n_stages)
    begins = [stage * each + min(stage, more) for stage in range(n_stages + 1)]
    return [range(first, last) for first, last in pairwise(begins)]


def trained_parameters(blocks: "Sequence[nn.Module]") -> list[Tensor]:
    """The parameters of blocks that gradients go to."""
    return [parameter for block in blocks for parameter in block.parameters() if parameter.requires_grad]
