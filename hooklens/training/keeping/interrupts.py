"""Ctrl-C while something must not be left half-done."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupts:
    """Whether somebody asked to stop.

    Attributes:
        asked: an interrupt came.
    """

    def __init__(self) -> None:
        self.asked = False


@contextlib.contextmanager
def hold_interrupts() -> Iterator[Interrupts]:
    """In the block the first interrupt (Ctrl-C) is only noted; the second one is a `KeyboardInterrupt` as ever.

    In other threads than the main one, which interrupts do not reach, and where somebody has put an interrupt to a use
    of their own, nothing changes.
    """
    noted = Interrupts()
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield noted
        return

    def note(number: int, frame: FrameType | None) -> None:
        if noted.asked:
            signal.default_int_handler(number, frame)
        noted.asked = True

    signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
