"""`hooklens plan`: what a call takes of memory, before anybody runs it."""

from typing import Annotated, Any

import torch
import typer

from hooklens.arguments import read_dtype
from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.plan import MemoryPlan
from hooklens.causal_lm.memory.plan import plan as plan_call
from hooklens.cli.arguments import Model, read_text
from hooklens.errors import InputError

EXIT_DOES_NOT_FIT = 1
"""Exit code when the free memory does not hold the call."""


def plan(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text that would run.", callback=read_text)],
    *,
    names: Annotated[
        list[str] | None,
        typer.Option(help="A hook name, word or glob to capture, given several times for several; all if not given."),
    ] = None,
    capture: Annotated[bool, typer.Option(help="Whether activations are kept.")] = True,
    batch: Annotated[int, typer.Option(min=1, help="Rows: the prompt so many times.")] = 1,
    logits_at: Annotated[int | None, typer.Option(help="The one position to unembed; all if not given.")] = None,
    pos_slice: Annotated[int | None, typer.Option(help="The one position to keep; all if not given.")] = None,
    dtype: Annotated[str | None, typer.Option(help="What activations are kept in: bfloat16, ...")] = None,
    backward: Annotated[bool, typer.Option("--backward", help="A backward pass follows.")] = False,
) -> None:
    """Tell what a call would take of memory: weights, captured sites, logits, peaks, and what to leave out.

    Nothing is run.
    """
    call: dict[str, Any] = {"logits_at": logits_at}
    if capture:
        call |= {"names_filter": names or None, "pos_slice": pos_slice, "dtype": _find_dtype(dtype)}
    elif names or pos_slice is not None or dtype is not None:
        raise InputError("--no-capture keeps nothing: leave out --names, --pos-slice and --dtype")
    hooked = HookedCausalLM.from_pretrained(model)
    made = plan_call(hooked, [prompt] * batch, capture=capture, grad=backward, backward=backward, **call)
    _tell(made)
    if not made.fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)


def _find_dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    return read_dtype(getattr(torch, name, name), what="--dtype")


def _tell(made: MemoryPlan) -> None:
    typer.echo(str(made))
    for suggestion in made.suggestions:
        typer.echo(f"  {suggestion}")
