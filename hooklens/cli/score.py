"""`hooklens score`: the log-probability of many continuations, or multiple choice, behind one prefix."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.arguments import Model, read_text
from hooklens.cli.group import telling_interrupts
from hooklens.errors import InputError
from hooklens.evaluation import ItemError, score_file

EXIT_FAULTY_ITEMS = 1
"""Exit code when some items could not be scored; 2 is an error that kept the others from being scored, too."""


def score(
    model: Model,
    *,
    prefix: Annotated[Path, typer.Option(help="A text file; one line break at its end is left out.")],
    items: Annotated[
        Path,
        typer.Option(
            help='JSON Lines: {"continuation": " text"}, {"tokens": [1, 2]} or {"question": "...", "choices": '
            '[" a", " b"], "answer": 0}, perhaps with "id".'
        ),
    ],
    out: Annotated[Path, typer.Option(help="JSON Lines, appended to; an interrupted run goes on where it was.")],
    target_delimiter: Annotated[
        str,
        typer.Option(
            help="What choices begin with and acc_norm and acc_bytes do not count.",
            show_default="a space",
            callback=read_text,
        ),
    ] = " ",
    batch_size: Annotated[int | None, typer.Option(help="Continuations at once; by memory if not given.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Score continuations of a prefix; the prefix runs once.

    Run it again to finish what was interrupted: results that are there are kept. Items that cannot be scored are named
    on stderr, with their line, before the others are scored.
    """
    text = _read_prefix(prefix)
    _check_items(items)
    hooked = HookedCausalLM.from_pretrained(model)
    with telling_interrupts(f"results so far are kept in {out}; run the same command again to go on"):
        summary = score_file(
            hooked,
            items,
            out,
            prefix=text,
            target_delimiter=target_delimiter,
            batch_size="auto" if batch_size is None else batch_size,
            progress=progress,
            on_errors=_tell,
        )
    found = f", {summary.n_found} were there already" if summary.n_found else ""
    faulty = f", {len(summary.errors)} could not be scored" if summary.errors else ""
    typer.echo(f"{out}: {summary.n_scored} items scored{found}{faulty}")
    if summary.errors:
        raise typer.Exit(EXIT_FAULTY_ITEMS)


def _tell(errors: list[ItemError]) -> None:
    for error in errors:
        typer.echo(f"hooklens: {error}", err=True)


def _check_items(path: Path) -> None:
    """Check before a model is loaded for them."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"cannot read items from {path}: {error.strerror or error}") from error


def _read_prefix(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read the prefix from {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"the prefix in {path} is not UTF-8 text ({error})") from error
    return text.removesuffix("\n").removesuffix("\r")
