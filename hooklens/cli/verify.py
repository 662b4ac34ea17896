"""`hooklens verify`: check a model against its checkpoint's reference and against HookLens' promises."""

import typer

from hooklens.cli.arguments import Model
from hooklens.verification import verify as verify_model

EXIT_FAILED = 1
"""Exit code when a check failed; 2 is an error that kept the checks from running."""


def verify(model: Model) -> None:
    """Check a model: equal to its reference implementation, undisturbed by watching, alive at every hook point."""
    report = verify_model(model)
    typer.echo(str(report))
    if not report.passed:
        raise typer.Exit(EXIT_FAILED)
