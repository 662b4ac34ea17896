"""`hooklens generate`: text that a model goes on with."""

import sys
from typing import Annotated

import typer

from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.arguments import Model, read_text


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to go on from.", callback=read_text)],
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to add.")] = 50,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits; 0 takes the most likely token, as --greedy does.")
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many most likely tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the most likely tokens with this probability together.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Draw from tokens at least this fraction as likely as the most likely one.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1, makes tokens of the text less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End with this text; may be given several times.", callback=read_text)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws reproducible.")] = None,
    *,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most likely token at every step.")] = False,
) -> None:
    """Print PROMPT and what the model goes on with, token by token."""
    hooked = HookedCausalLM.from_pretrained(model)
    steps = hooked.generate_stream(
        prompt,
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop_strings=stop or None,
        seed=seed,
    )
    typer.echo(prompt, nl=False)
    for step in steps:
        typer.echo("" if step.text is None else step.text[0], nl=False)
        # A pipe would hold the tokens back.
        sys.stdout.flush()
    typer.echo()
