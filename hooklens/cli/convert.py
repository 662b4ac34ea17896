"""`hooklens convert`: read any supported checkpoint, write a folder that transformers loads."""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from hooklens.causal_lm import HookedCausalLM
from hooklens.display.numbers import format_bytes
from hooklens.errors import InputError


class DType(str, Enum):
    """What weights can be written in."""

    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


_SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]B|\d+", re.IGNORECASE)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, hub name, or bundled:NAME.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="The folder to write.")],
    *,
    dtype: Annotated[DType, typer.Option(help="Dtype of the weights; auto keeps the checkpoint's.")] = DType.auto,
    max_shard_size: Annotated[str, typer.Option(help="Weight files are split at this size.")] = "5GB",
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that stands in DST.")] = False,
) -> None:
    """Write a checkpoint anew, in Hugging Face format: safetensors, today's names, another dtype or shard size.

    Every tensor arrives bit for bit unless --dtype changes it.
    """
    if not _SHARD_SIZE.fullmatch(max_shard_size):
        raise InputError(f"--max-shard-size is {max_shard_size!r}; expected a size such as 500MB, 5GB, or bytes")
    if (destination / "config.json").exists() and not overwrite:
        raise InputError(f"{destination} already holds a checkpoint; choose another folder, or pass --overwrite")
    chosen = None if dtype is DType.auto else getattr(torch, dtype.value)
    model = HookedCausalLM.from_pretrained(source)
    model.save_pretrained(destination, dtype=chosen, max_shard_size=max_shard_size)
    written = sum(path.stat().st_size for path in destination.glob("*.safetensors"))
    typer.echo(
        f"wrote {destination}: {model.n_params_total:,} parameters in {format_bytes(written)} of safetensors files"
    )
