"""`hooklens scan`: the first report on a prompt, in the terminal and as a page."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens import analysis
from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.arguments import Model, read_text
from hooklens.errors import InputError


def scan(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to look into.", callback=read_text)],
    *,
    answer: Annotated[
        str | None,
        typer.Option(help="The next token to explain; the likeliest one if not given.", callback=read_text),
    ] = None,
    wrong: Annotated[
        str | None,
        typer.Option(help="The token to compare it with; the likeliest other one if not given.", callback=read_text),
    ] = None,
    pos: Annotated[int, typer.Option(help="The position whose next token is asked about; -1 is the last.")] = -1,
    k: Annotated[int, typer.Option(min=1, help="How many predictions to list.")] = 3,
    html: Annotated[Path | None, typer.Option(help="Also write the page, as one file of HTML.")] = None,
) -> None:
    """Tell what the model does with PROMPT: predictions, layers, components, heads and their sources.

    Each finding ends with the call of the library that makes it.
    """
    if html is not None:
        _check_place(html)
    loaded = HookedCausalLM.from_pretrained(model)
    found = analysis.report(loaded, prompt, answer=answer, wrong=wrong, pos=pos, k=k)
    typer.echo(f">>> import hooklens as hl; model = hl.HookedCausalLM.from_pretrained({model!r})")
    typer.echo(str(found))
    if html is not None:
        found.save(html)
        typer.echo(f"wrote {html}")


def _check_place(html: Path) -> None:
    """Check before the work that the page has a place."""
    if not html.parent.is_dir():
        raise InputError(f"cannot write {html}: the folder {html.parent} does not exist")
    if not html.name or (html.exists() and not html.is_file()):
        raise InputError(f"cannot write {html}: it is no regular file")
