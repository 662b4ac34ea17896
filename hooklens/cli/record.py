"""`hooklens record`: the activations of a corpus, in a folder of files."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.arguments import Model, read_text
from hooklens.cli.group import telling_interrupts
from hooklens.datasets import record as record_corpus
from hooklens.display.numbers import format_bytes
from hooklens.errors import InputError


def record(
    model: Model,
    corpus: Annotated[
        Path,
        typer.Argument(
            metavar="CORPUS", help='JSON Lines, perhaps .gz: {"text": "..."} or {"tokens": [1, 2]} for each document.'
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="A new folder (or its URL), or that of an interrupted recording.")
    ],
    *,
    site: Annotated[
        list[str],
        typer.Option(
            help="A hook point: a word (resid_post), a name or a glob; may be given several times.", callback=read_text
        ),
    ],
    position: Annotated[
        list[int] | None,
        typer.Option(help="Keep this token of each document, -1 the last; may be given several times."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; the model's if not given.")] = None,
    text_key: Annotated[str, typer.Option(help="Where lines have their text.")] = "text",
    max_tokens: Annotated[int | None, typer.Option(help="Read about so many tokens.")] = None,
    row_length: Annotated[int | None, typer.Option(help="Longer documents are cut into pieces of this length.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="About how many tokens run at once.")] = 8192,
    shard_bytes: Annotated[int, typer.Option(help="About how many bytes of activations a file holds.")] = 2**28,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Keep the activations of some hook points on a corpus.

    Run it again to finish what was interrupted. `hooklens.datasets.ActivationDataset(OUT)` reads the folder.
    """
    kinds = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64}
    if dtype is not None and dtype not in kinds:
        raise InputError(f"--dtype is {dtype!r}; expected one of {', '.join(kinds)}")
    hooked = HookedCausalLM.from_pretrained(model)
    with telling_interrupts(f"what was recorded is kept in {out}; run the same command again to go on"):
        found = record_corpus(
            hooked,
            corpus,
            site,
            out,
            dtype=None if dtype is None else kinds[dtype],
            positions=position or None,
            text_key=text_key,
            max_tokens=max_tokens,
            row_length=row_length,
            batch_tokens=batch_tokens,
            shard_bytes=shard_bytes,
            progress=progress,
        )
    typer.echo(
        f"{len(found):,} tokens of {len(found.sites)} hook points, {format_bytes(found.nbytes)}, in "
        f"{len(found.manifest.shards)} files in {out}"
    )
