"""`python -m hooklens.cli`: the command line without the installed script."""

from hooklens.cli import app

app()
