"""The one door to progress bars: which kind is drawn, when, and how all of them are switched off.

A function that may take long opens a bar here and hands on the `progress` of its caller:

    with progress_bar("patching", total=len(cells), unit="cell", progress=progress) as bar:
        for cell in cells:
            ...
            bar.update()

What ends within two seconds draws nothing. A bar goes to stderr as text, and is a widget in a notebook that has
ipywidgets (the extra `notebook` installs them); a notebook without them gets the text. It is closed when the block is
left, by an error or an interrupt as well.

Bars are drawn whether or not stderr is a terminal, so logs get them as well. Those of functions that have no argument
for it (loading, saving) are drawn in terminals and notebooks only. `hl.progress_bars(False)`, or the environment
variable HOOKLENS_PROGRESS=0, switches all of them off.
"""

import os
import sys
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar

from hooklens.errors import InputError
from hooklens.optional import import_package

if TYPE_CHECKING:
    from tqdm import tqdm

DELAY = 2.0
"""Seconds after which a run counts as long and shows its bar."""

VARIABLE = "HOOKLENS_PROGRESS"
"""The environment variable that switches bars off."""

_SAYS = {"": True, "1": True, "true": True, "on": True, "yes": True} | dict.fromkeys(("0", "false", "off", "no"), False)
# Modules of which one is loaded where output goes to a notebook; tqdm tells it by the same two.
_OF_NOTEBOOKS = ("ipykernel.zmqshell", "IPython.utils._process_emscripten")


class progress_bars:  # noqa: N801 -- called as a function, like torch's switches of this kind
    """Switch the progress bars of all of HookLens on or off.

    It acts at once, on bars that are opened from then on, in all threads. As the head of a `with` block it holds until
    the block ends:

        hl.progress_bars(False)
        with hl.progress_bars(False):
            ...

    A call with `progress=False` (`verbose=False` of `generate`) draws no bar either way; one with `progress=True` draws
    none while bars are off.

    Args:
        shown: whether bars are drawn; None leaves it to the environment variable HOOKLENS_PROGRESS again, by which
            they are drawn unless it says 0, false, off or no.

    Raises:
        InputError: `shown` is neither True nor False nor None.
    """

    _shown: ClassVar[bool | None] = None

    def __init__(self, shown: bool | None) -> None:  # noqa: FBT001 -- what the name asks
        # By identity: 0 and 1 compare equal to switches, and are none.
        if not any(shown is one for one in (True, False, None)):
            raise InputError(f"shown is {shown!r}, expected True, False or None (as {VARIABLE} says)")
        self._before, progress_bars._shown = progress_bars._shown, shown

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        progress_bars._shown = self._before


def progress_bar(
    description: str,
    over: Iterable[Any] | None = None,
    *,
    progress: bool | None,
    total: int | None = None,
    unit: str = "step",
    initial: int = 0,
    scaled: bool = False,
    stays: bool = False,
) -> "tqdm[Any]":
    """A progress bar, to be opened by `with`.

    Args:
        description: what is being done, in front of the bar.
        over: what is gone through by `for each in bar`, which counts; else `bar.update(n)` does.
        progress: what the call's own argument says; None for a call that has none: its bar is drawn in terminals and
            notebooks only, where True draws into files as well.
        total: how much there is to do; by default the length of `over`.
        unit: what is counted, in the singular.
        initial: how much was done before.
        scaled: write large counts short (`1.5M`).
        stays: whether the full bar stays on the screen, as it does for runs whose last numbers are worth a look.

    Raises:
        InputError: the environment variable HOOKLENS_PROGRESS says neither yes nor no.
        MissingDependencyError: tqdm is not installed.
    """
    shown = progress is not False and _are_shown()
    kind = _bar_class() if shown else import_package("tqdm.std").tqdm
    bar: tqdm[Any] = kind(
        over,
        desc=description,
        total=total,
        unit=unit,
        initial=initial,
        unit_scale=scaled,
        leave=stays,
        delay=DELAY,
        disable=None if shown and progress is None else not shown,
    )
    return bar


def hub_bars() -> dict[str, Any]:
    """Keywords for what downloads from the hub, whose client draws bars of its own: none while bars are off."""
    if _are_shown():
        return {}
    kind: Any = import_package("tqdm.std").tqdm

    class SilentBar(kind):  # type: ignore[misc]  # of a package that is imported here
        """A bar that is never drawn."""

        def __init__(self, *given: Any, **options: Any) -> None:
            # Options of the client's own class.
            options.pop("name", None)
            super().__init__(*given, **{**options, "disable": True})

    return {"tqdm_class": SilentBar}


def _are_shown() -> bool:
    """What the switch says, or else the environment."""
    if progress_bars._shown is not None:
        return progress_bars._shown
    said = os.environ.get(VARIABLE, "")
    try:
        return _SAYS[said.strip().lower()]
    except KeyError:
        raise InputError(f"the environment variable {VARIABLE} is {said!r}, expected 0 (no bars) or 1") from None


def _bar_class() -> Any:
    """The widget where a notebook can draw it, or else the text."""
    # `tqdm.auto` chooses alike, but warns in red of absent widgets before it falls back to text.
    if any(name in sys.modules for name in _OF_NOTEBOOKS) and import_package("tqdm.notebook").IProgress is not None:
        return import_package("tqdm.auto").tqdm
    return import_package("tqdm.std").tqdm
