"""The command line: `hooklens COMMAND`, one module per command.

A new command is a module here with a documented function, and one line below.
"""

import typer

from hooklens.cli import convert, demo, generate, info, patch, score, verify
from hooklens.cli.group import HookLensGroup

app = typer.Typer(
    name="hooklens",
    cls=HookLensGroup,
    help="Look inside decoder-only language models, and change what happens there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (demo.demo, info.info, verify.verify, convert.convert, generate.generate, score.score, patch.patch):
    app.command()(command)

__all__ = ["app"]
