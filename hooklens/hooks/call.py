"""Who listens: to one call, to all calls of a thread inside a `with` block, to all calls of a model.

A call is a value that the forward opens and hands down. It holds the tokens that run and the listeners of this call;
no module keeps anything about it. So two threads can use one model, a hook can call the model that it hangs on, and a
call that is broken off leaves nothing behind.

    model.add_hook(...)             belongs to the hook point, and acts in every call
    with model.hooks(...): ...      belongs to the thread inside the block, and acts in every call made there
    model.run_with_hooks(...)       belongs to the call

Hooks run in this order, and captures see what they leave.
"""

import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn

from hooklens.errors import HookLensError
from hooklens.hooks.spread import Relay

if TYPE_CHECKING:
    from hooklens.hooks.point import HookPoint

    class HookFunctionByName(Protocol):
        """A hook function whose point is a keyword."""

        def __call__(self, tensor: Tensor, /, *, hook: HookPoint) -> Tensor | None:
            """What takes the tensor's place; None: the tensor itself."""
            ...

    HookFunction = Callable[[Tensor, HookPoint], Tensor | None] | HookFunctionByName | Callable[[Tensor], Tensor | None]
else:
    HookFunction = Callable[..., Tensor | None]
Form = Literal["point", "hook=", "tensor"]
"""How a hook function is called: as `fn(tensor, point)`, `fn(tensor, hook=point)` or `fn(tensor)`."""
Direction = Literal["fwd", "bwd"]
Phase = Literal["prefill", "decode"]
Returned = TypeVar("Returned")
Value = TypeVar("Value")


@runtime_checkable
class TokenIndex(Protocol):
    """Which tokens a tensor's columns are: what an edit needs to find its positions."""

    @property
    def token_index(self) -> Tensor:
        """`[batch pos]`, the position of each column's token in its row's whole sequence; -1 for padding."""
        ...

    @property
    def n_tokens(self) -> Tensor:
        """`[batch]`, real tokens of each row so far, those in a cache included."""
        ...

    @property
    def phase(self) -> Phase:
        """`"prefill"`, or `"decode"` while generating."""
        ...

    @property
    def positions_by_column(self) -> Sequence[int] | None:
        """`token_index` of every row in plain numbers, where all rows have the same; else None."""
        ...

    @property
    def length(self) -> int:
        """`n_tokens` of every row, where `positions_by_column` is known."""
        ...

    @property
    def columns(self) -> Sequence[int] | Tensor | None:
        """Which columns of the call a tensor's position axis holds; None: all of them."""
        ...

    @property
    def n_run(self) -> int:
        """Columns of the call."""
        ...


class Hook:
    """A hook function, how to call it, and the point it is told.

    Attributes:
        point: the hook point, with the name that the module has for it which attached the hook.
        permanent: survives `reset_hooks`.
        removed: its gradient listeners are silent.
        form: how the function is called.
    """

    __slots__ = ("fn", "form", "permanent", "point", "removed")

    def __init__(
        self,
        fn: Callable[..., Tensor | None],
        point: "HookPoint",
        *,
        permanent: bool = False,
        form: Form | None = None,
    ) -> None:
        if not callable(fn):
            raise HookLensError(f"a hook must be a function fn(tensor, hook), got {type(fn).__name__}")
        self.fn: Callable[..., Tensor | None] = fn
        self.point = point
        self.permanent = permanent
        self.removed = False
        self.form: Form = read_form(fn, else_form="point") if form is None else form

    @property
    def source(self) -> object:
        """What was attached."""
        return self.fn

    def run(self, tensor: Tensor, call: "Call") -> Tensor | None:
        """What the function makes of a tensor."""
        if self.form == "hook=":
            return self.fn(tensor, hook=self.point)
        return call_in_form(self.fn, self.form, tensor, self.point)


def call_in_form(
    fn: Callable[..., Tensor | None], form: Form, tensor: Tensor, point: "HookPoint | None"
) -> Tensor | None:
    """What a function makes of a tensor at a hook point."""
    if form == "point":
        return fn(tensor, point)
    return fn(tensor, hook=point) if form == "hook=" else fn(tensor)


def read_form(
    fn: Callable[..., Any], *, else_form: Form, what: str = "a hook", error: type[HookLensError] = HookLensError
) -> Form:
    """How a function is called at a hook point, by its parameters.

    One that has a parameter called `hook` is given the point under that name, wherever it stands. Else one that needs
    two arguments is given the point behind the tensor, and one that takes a single one the tensor alone. Of a module
    its `forward` counts.

    Args:
        fn: a function, a method, a `functools.partial`, a module, or any other object that can be called.
        else_form: the form of what takes either, as `fn(tensor, scale=2)` and `fn(*given)` do.
        what: what messages call it.
        error: what is raised.

    Raises:
        HookLensError: the function cannot be called in any of these forms.
    """
    try:
        signature = inspect.signature(fn.forward if isinstance(fn, nn.Module) else fn)
    except (TypeError, ValueError):
        # A built-in function, such as `torch.neg`, which knows no hook points.
        return "tensor"
    parameter = signature.parameters.get("hook")
    by_keyword = parameter is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY
    forms: dict[Form, tuple[tuple[None, ...], dict[str, None]]] = (
        {"hook=": ((None,), {"hook": None})} if by_keyword else {"point": ((None, None), {}), "tensor": ((None,), {})}
    )
    problems = []
    for form, (arguments, keywords) in list(forms.items()):
        try:
            signature.bind(*arguments, **keywords)
        except TypeError as problem:
            problems.append(str(problem))
            del forms[form]
    if not forms:
        name = getattr(fn, "__name__", type(fn).__name__)
        raise error(
            f"{what} is called as fn(tensor), fn(tensor, point) or fn(tensor, hook=point); {name}{signature} cannot "
            f"be: {problems[0]}. Write `def fn(tensor, hook): ...`"
        )
    return else_form if len(forms) > 1 else next(iter(forms))


@runtime_checkable
class Watcher(Protocol):
    """Something that looks at what passes a hook point, and must not change it."""

    def keep(self, tensor: Tensor, point: "HookPoint", call: "Call") -> None:
        """Look at a tensor."""


class Listening:
    """What listens at one point: hooks, gradient hooks, and watchers."""

    __slots__ = ("gradient_hooks", "hooks", "watchers")

    def __init__(
        self,
        hooks: Iterable[Hook] = (),
        gradient_hooks: Iterable[Hook] = (),
        watchers: Iterable[Watcher] = (),
    ) -> None:
        self.hooks = list(hooks)
        self.gradient_hooks = list(gradient_hooks)
        self.watchers = list(watchers)

    def __bool__(self) -> bool:
        return bool(self.hooks or self.gradient_hooks or self.watchers)

    def joined(self, later: "Listening | None") -> "Listening":
        """These and later ones; the very object where there are no others."""
        if later is None:
            return self
        return Listening(
            [*self.hooks, *later.hooks],
            [*self.gradient_hooks, *later.gradient_hooks],
            [*self.watchers, *later.watchers],
        )


Listeners = Mapping[Any, Listening]
"""Who listens at which hook points; never changed once it is handed to a call."""

NOBODY: Listeners = {}


class Call:
    """One call in progress.

    Attributes:
        listeners: of this call and of the thread's `with` blocks.
        tokens: which tokens the columns of tensors are, at the points that are reached next; None where a module
            has no tokens.
        switches: what runs of modules that can compute in several ways, as the thread's `with` blocks say it.
        relay: what shows activations to listeners in other processes; None: all are here.
    """

    __slots__ = ("listeners", "relay", "switches", "tokens")

    def __init__(
        self,
        listeners: Listeners = NOBODY,
        tokens: TokenIndex | None = None,
        switches: "Switches | None" = None,
        relay: "Relay | None" = None,
    ) -> None:
        self.listeners = listeners
        self.relay = relay
        self.tokens = tokens
        self.switches = thread_switches() if switches is None else switches

    def hears(self, point: "HookPoint") -> bool:
        """Whether anybody listens at a hook point."""
        return point.own is not None or (bool(self.listeners) and point in self.listeners)

    def on(self, tokens: TokenIndex) -> "Call":
        """The same call where tensors hold other columns."""
        return Call(self.listeners, tokens, self.switches, self.relay)

    def through(self, relay: "Relay") -> "Call":
        """The same call, where a relay shows activations."""
        return Call(self.listeners, self.tokens, self.switches, relay)


def open_call() -> Call:
    """A call of a part of a network by itself, with the listeners of the thread's `with` blocks.

    Inside a module of others that runs in a call, it is that call.
    """
    if not _all_entries:
        return Call()
    around = next((entry.call for entry in reversed(_entries.get()) if entry.call is not None), None)
    if around is None:
        return Call(thread_listeners())
    return Call(thread_listeners(), around.tokens, relay=around.relay)


def join_listeners(groups: Iterable[Listeners]) -> Listeners:
    """The listeners of several groups, those of earlier ones first."""
    present = [group for group in groups if group]
    if len(present) < 2:
        return present[0] if present else NOBODY
    joined: dict[HookPoint, Listening] = {}
    for group in present:
        for point, listening in group.items():
            earlier = joined.get(point)
            joined[point] = listening if earlier is None else earlier.joined(listening)
    return joined


class _Entry:
    """One way into a `with` block: a block can be entered by several threads, and again while it is open.

    Attributes:
        call: the call that is in progress inside the block, where a module that hands none down runs in one.
    """

    __slots__ = ("__weakref__", "block", "call", "listeners")

    def __init__(self, block: "ListeningBlock[Any]", listeners: Listeners, call: Call | None = None) -> None:
        self.block = block
        self.listeners = listeners
        self.call = call


# The `with` blocks that the calling thread is inside of; a new thread is inside of none.
_entries: ContextVar[tuple[_Entry, ...]] = ContextVar("hooklens_entries", default=())
# Those of all threads: while there are none, no call has to look for its thread's. A thread that ends inside of a
# block lets go of its entry.
_all_entries: dict[int, "weakref.ref[_Entry]"] = {}


def thread_listeners() -> Listeners:
    """The listeners of the `with` blocks that the calling thread is inside of.

    Raises:
        HookLensError: while `torch.compile` traces; a compiled call would not notice when the block is left.
    """
    if not _all_entries:
        return NOBODY
    if torch.compiler.is_compiling():
        raise HookLensError(
            "a compiled model does not see the hooks of a `with` block: hand them to the call (run_with_hooks, "
            "run_with_cache), or call the model uncompiled"
        )
    return join_listeners([entry.listeners for entry in _entries.get()])


class ListeningBlock(Generic[Value]):
    """A `with` block inside of which listeners act in every call that the thread makes.

    Args:
        listeners: who listens, made on entering.
        value: what `with ... as` gives.
        silences: gradient hooks fall silent on leaving, also for backward passes that come later.
        call: the call that is in progress inside the block.
    """

    def __init__(
        self, listeners: Callable[[], Listeners], value: Value, *, silences: bool = True, call: Call | None = None
    ) -> None:
        self._make = listeners
        self._value = value
        self._silences = silences
        self._call = call

    def __enter__(self) -> Value:
        entry = _Entry(self, self._make(), self._call)
        key = id(entry)
        _all_entries[key] = weakref.ref(entry, lambda _: _all_entries.pop(key, None))
        try:
            # In one line, so that no interrupt comes between the block's opening and the caller's `with`.
            return (_entries.set((*_entries.get(), entry)), self._value)[1]
        except BaseException:
            _leave(entry)
            raise

    def __exit__(self, *error: object) -> None:
        entry = None
        try:
            entry = self._last_entry()
            self._close(entry)
        except BaseException:
            self._close(entry or self._last_entry())
            raise

    def _last_entry(self) -> _Entry | None:
        """The thread's last way in; a generator may leave its block out of turn."""
        return next((entry for entry in reversed(_entries.get()) if entry.block is self), None)

    def _close(self, entry: _Entry | None) -> None:
        if entry is None:
            return
        _leave(entry)
        for listening in entry.listeners.values() if self._silences else ():
            for hook in listening.gradient_hooks:
                hook.removed = True


Switches = Mapping[Any, tuple[str, ...]]
"""Which ways of computing are in use, by whoever has several of them; never changed once it is handed to a call."""

_UNSWITCHED: Switches = {}
# The blocks that the calling thread is inside of, each with its mark, whose ways it says, and which.
_switches: ContextVar[tuple[tuple[object, Any, tuple[str, ...]], ...]] = ContextVar("hooklens_switches", default=())
# The open blocks of all threads: while there are none, no call has to look for its thread's.
_open_switches: dict[int, object] = {}


def thread_switches() -> Switches:
    """What the `with` blocks that the calling thread is inside of have switched.

    Raises:
        HookLensError: while `torch.compile` traces; a compiled call would not notice when the block is left.
    """
    if not _open_switches:
        return _UNSWITCHED
    if torch.compiler.is_compiling():
        raise HookLensError("a compiled model does not see what a `with` block switches: call the model uncompiled")
    return {owner: ways for _, owner, ways in _switches.get()}


@contextmanager
def switched(owner: object, ways: tuple[str, ...]) -> Iterator[None]:
    """A `with` block inside of which the ways of computing of one owner are these in every call that the thread makes.

    Blocks nest, and a call keeps what it was opened with, also in a backward pass that computes it again.
    """
    mark = object()
    _open_switches[id(mark)] = mark
    try:
        _switches.set((*_switches.get(), (mark, owner, ways)))
        yield
    finally:
        # A generator may leave its block out of turn.
        _switches.set(tuple(entry for entry in _switches.get() if entry[0] is not mark))
        _open_switches.pop(id(mark), None)


def _leave(entry: _Entry) -> None:
    _entries.set(tuple(other for other in _entries.get() if other is not entry))
    _all_entries.pop(id(entry), None)


def run_apart(fn: Callable[..., Returned], *arguments: Any, **keywords: Any) -> Returned:
    """Run a function that is inside none of the thread's `with` blocks.

    So hook functions run: a call of the model in one of them is a call of its own. In a copy of the context, which
    needs no tidying up when the function is broken off.
    """
    return copy_context().run(_leave_blocks, fn, *arguments, **keywords) if _all_entries else fn(*arguments, **keywords)


def _leave_blocks(fn: Callable[..., Returned], *arguments: Any, **keywords: Any) -> Returned:
    _entries.set(())
    return fn(*arguments, **keywords)


def run_listening(listeners: Listeners, fn: Callable[..., Returned], *arguments: Any, **keywords: Any) -> Returned:
    """Run a function inside a `with` block of its own, for modules whose forward hands no call down."""

    def inside() -> Returned:
        with ListeningBlock(lambda: listeners, None, silences=False):
            return fn(*arguments, **keywords)

    return copy_context().run(inside)


def run_inside(call: Call, fn: Callable[..., Returned], *arguments: Any, **keywords: Any) -> Returned:
    """Run a function in a call that it knows nothing of: hook points and parts that it runs belong to the call."""
    if torch.compiler.is_compiling() and not call.listeners:
        return fn(*arguments, **keywords)

    def inside() -> Returned:
        # The listeners of the blocks around are among the call's.
        _entries.set(())
        with ListeningBlock(lambda: call.listeners, None, silences=False, call=call):
            return fn(*arguments, **keywords)

    return copy_context().run(inside)


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

    def __exit__(self, *error: object) -> None:
        self.remove()
