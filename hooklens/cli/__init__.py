"""The command line: `hooklens COMMAND`, one module per command.

A new command is a module here with a documented function, and one line below.
"""

import typer

from hooklens.cli import convert, demo, generate, info, merge, patch, plan, record, scan, score, verify
from hooklens.cli.group import HookLensGroup, describe_exit_codes

app = typer.Typer(
    name="hooklens",
    cls=HookLensGroup,
    help="Look inside decoder-only language models, and change what happens there.",
    epilog=describe_exit_codes("a check failed, or items could not be scored"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
# Each command, and what its exit code 1 says.
for command, failed in (
    (demo.demo, None),
    (info.info, None),
    (verify.verify, "a check failed"),
    (convert.convert, None),
    (merge.merge, None),
    (generate.generate, None),
    (score.score, "some items could not be scored, the others were"),
    (patch.patch, None),
    (plan.plan, "the free memory does not hold the call"),
    (record.record, None),
    (scan.scan, None),
):
    app.command(epilog=describe_exit_codes(failed))(command)

__all__ = ["app"]
