"""What all commands share in how they end: with a message and an exit code, never with a traceback."""

import errno
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import typer
from typer.core import TyperGroup

from hooklens.errors import HookLensError

EXIT_ERROR = 2
"""The command could not do its work; 1 is a check that failed, 0 success."""
EXIT_BUG = 70
"""HookLens itself is at fault: `EX_SOFTWARE` of sysexits.h."""
EXIT_INTERRUPTED = 130
"""Ctrl-C; what a shell gives for a process that SIGINT ended."""

TRACEBACK = "HOOKLENS_TRACEBACK"
"""An environment variable; with any value but an empty one, errors show their traceback before their message."""


def describe_exit_codes(failed: str | None = None) -> str:
    """The exit codes of a command, for the end of its help.

    Args:
        failed: what code 1 says; None where the command does not have it.
    """
    codes = {
        0: "success",
        1: failed,
        EXIT_ERROR: "an error, told on stderr",
        EXIT_BUG: f"a fault of HookLens (set {TRACEBACK}=1 to see where)",
        EXIT_INTERRUPTED: "interrupted with Ctrl-C",
    }
    return "Exit codes: " + "; ".join(f"{code} {text}" for code, text in codes.items() if text is not None) + "."


@contextmanager
def telling_interrupts(kept: str) -> Iterator[None]:
    """On Ctrl-C in the block, say what is kept and end with exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"\nhooklens: interrupted; {kept}", err=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None


class HookLensGroup(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; an error is a message on stderr and an exit code, see `describe_exit_codes`."""
        # What a terminal's encoding lacks is printed as an escape, not lost with all that comes behind it.
        reconfigure = getattr(sys.stdout, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
        try:
            with telling_interrupts("the command has not finished"):
                return super().invoke(ctx)
        except Exception as error:
            # Typer's own errors know how to show themselves, and a closed pipe is nobody's error.
            if _is_typers(error) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            if os.environ.get(TRACEBACK):
                traceback.print_exc()
            message, code = _describe(error)
            typer.echo(f"hooklens: {message}", err=True)
            raise typer.Exit(code) from None


def _is_typers(error: Exception) -> bool:
    """Whether the command line's own library raised it: a wrong option, or the end of a command."""
    kinds = {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    return bool(kinds & {f"{library}.{kind}" for library in ("typer", "click") for kind in _TYPERS})


_TYPERS = ("ClickException", "Exit", "Abort")


def _describe(error: Exception) -> tuple[str, int]:
    """What to say, and the exit code."""
    if isinstance(error, HookLensError):
        return str(error), EXIT_ERROR
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"memory does not suffice ({str(error).splitlines()[0] if str(error) else 'out of memory'})", EXIT_ERROR
    if isinstance(error, OSError):
        place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{place}{error.strerror or error}", EXIT_ERROR
    first_line = (str(error).splitlines() or [""])[0]
    return (
        f"a fault of HookLens itself, please report it: {type(error).__name__}: {first_line} (set {TRACEBACK}=1 to see "
        "where)",
        EXIT_BUG,
    )
