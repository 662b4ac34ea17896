"""Splices: computations of others that are put at hook points for a call, with hook points of their own.

A splice is a listener, as hooks and edits are: nothing is put into the network, and a call that does not know of it
does not feel it. Its points have names below the place where it acts, `blocks.8.hook_resid_post.hook_sae_acts`, and
stand beside the model's own wherever a point is named, as long as the splice listens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from hooklens.arguments import refusal
from hooklens.errors import HookLensError, InputError, join_names
from hooklens.hooks.call import Call, Hook, Listeners, ListeningBlock, Value
from hooklens.hooks.point import HookPoint

SpliceFunction = Callable[[Tensor, Call], Tensor | None]


class Splice(ABC):
    """A computation at hook points of a model."""

    @property
    @abstractmethod
    def points(self) -> Mapping[str, HookPoint]:
        """Its own hook points by name; each belongs to this splice alone."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Refuse a model that it does not fit.

        Raises:
            HookLensError: what does not fit, and what to do.
        """

    @abstractmethod
    def start(self) -> Sequence[tuple[str, SpliceFunction]]:
        """What it does at which of the model's points, for one call or one `with` block.

        A function gives the tensor that goes on from the point, or None to leave it. It calls the splice's own points
        with the call that it is handed. What a function keeps for another it keeps in what it shares with it here, and
        not on the splice.
        """


class SpliceHook(Hook):
    """What a splice does at a point, as a hook."""

    __slots__ = ("splice",)

    def __init__(self, fn: SpliceFunction, point: HookPoint, splice: Splice) -> None:
        super().__init__(fn, point, form="point")
        self.splice = splice

    @property
    def source(self) -> object:
        """The splice."""
        return self.splice

    def run(self, tensor: Tensor, call: Call) -> Tensor | None:
        """What the splice makes of a tensor."""
        return self.fn(tensor, call)


def read_splices(given: object, *, what: str = "splices", error: type[HookLensError] = InputError) -> Sequence[Splice]:
    """Splices of a call.

    Raises:
        HookLensError: no list, entries that are none, or two whose points have one name.
    """
    if type(given) is tuple and not given:
        return given
    if not isinstance(given, Sequence) or not all(isinstance(one, Splice) for one in given):
        raise refusal(given, what, "a list of splices, such as [sae.at('blocks.8.hook_resid_post')]", error)
    names = [name for splice in given for name in splice.points]
    if doubled := sorted({name for name in names if names.count(name) > 1}):
        raise error(f"{what}: two of them have points called {join_names(doubled)}; put one of them in a block outside")
    return given


# The points of splices that listen to what the thread does, each with the module that they stand beside.
_spliced: ContextVar[tuple[tuple[object, object, Mapping[str, HookPoint]], ...]] = ContextVar(
    "hooklens_spliced", default=()
)
# The open marks of all threads: while there are none, no look-up of a name has to look for its thread's.
_marks: set[int] = set()


def spliced_points(root: object) -> dict[str, HookPoint]:
    """The points of splices that stand beside a module's own in this thread, the latest ones last."""
    if not _marks:
        return {}
    return {name: point for _, owner, points in _spliced.get() if owner is root for name, point in points.items()}


@contextmanager
def naming(root: object, splices: Sequence[Splice]) -> Iterator[None]:
    """A `with` block inside of which the points of splices stand beside a module's own."""
    if not splices:
        yield
        return
    mark = object()
    _marks.add(id(mark))
    points = {name: point for splice in splices for name, point in splice.points.items()}
    try:
        _spliced.set((*_spliced.get(), (mark, root, points)))
        yield
    finally:
        _spliced.set(tuple(entry for entry in _spliced.get() if entry[0] is not mark))
        _marks.discard(id(mark))


class SplicedBlock(ListeningBlock[Value]):
    """A `with` block of listeners with splices among them."""

    def __init__(
        self, listeners: Callable[[], Listeners], value: Value, root: object, splices: Sequence[Splice]
    ) -> None:
        super().__init__(listeners, value)
        self._root, self._splices = root, splices
        self._open: list[Any] = []

    def __enter__(self) -> Value:
        names = naming(self._root, self._splices)
        names.__enter__()
        try:
            value = super().__enter__()
        except BaseException:
            names.__exit__(None, None, None)
            raise
        self._open.append(names)
        return value

    def __exit__(self, *error: object) -> None:
        try:
            super().__exit__(*error)
        finally:
            if self._open:
                self._open.pop().__exit__(None, None, None)
