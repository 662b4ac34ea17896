"""What all commands share in how they end: a HookLens error is a message, not a traceback."""

from typing import Any

import typer
from typer.core import TyperGroup

from hooklens.errors import HookLensError

EXIT_ERROR = 2
"""Exit code of a command that could not do its work; 1 is a check that failed, 0 success."""


class HookLensGroup(TyperGroup):
    """The group of all commands."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command; on a HookLensError print its text to stderr and exit with code 2."""
        try:
            return super().invoke(ctx)
        except HookLensError as error:
            typer.echo(f"hooklens: {error}", err=True)
            raise typer.Exit(EXIT_ERROR) from error
