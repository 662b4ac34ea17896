"""`hooklens patch`: activation patching over a grid of sites, as a table and an image."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.arguments import Model, read_text
from hooklens.errors import InputError, MissingDependencyError
from hooklens.files import replace_file
from hooklens.patching import LogitDiff, LogProb, Metric, Pair, SweepInterruptedError, SweepResult, sweep


def patch(
    model: Model,
    *,
    clean: Annotated[str, typer.Option(help="The prompt whose behaviour is studied.", callback=read_text)],
    corrupted: Annotated[
        str, typer.Option(help="A prompt of as many tokens that behaves otherwise.", callback=read_text)
    ],
    answer: Annotated[str, typer.Option(help="The next token that the clean prompt calls for.", callback=read_text)],
    wrong: Annotated[
        str | None,
        typer.Option(
            help="The corrupted prompt's answer; the metric is then the logit difference, else log p.",
            callback=read_text,
        ),
    ] = None,
    site: Annotated[str, typer.Option(help="What to patch: resid_pre, z, mlp_out, pattern, ...")] = "resid_pre",
    noise: Annotated[bool, typer.Option("--noise", help="Patch the clean run instead of the corrupted one.")] = False,
    out: Annotated[
        Path, typer.Option(help="Where the table goes, as CSV; the image gets the same name with .png.")
    ] = Path("patching.csv"),
    top: Annotated[int, typer.Option(min=1, help="How many of the strongest cells to show.")] = 10,
) -> None:
    """Patch each site of one prompt's run with the other's activation, and tell what it does to the answer.

    The image is left out where the plot extra of HookLens is not installed.
    """
    _check_out(out)
    metric: Metric = LogProb(answer) if wrong is None else LogitDiff(answer, wrong)
    loaded = HookedCausalLM.from_pretrained(model)
    pair = Pair.from_text(loaded, clean, corrupted)
    try:
        result = sweep(loaded, pair, sites=site, metric=metric, direction="noise" if noise else "denoise")
    except SweepInterruptedError as stopped:
        _write_table(stopped.result, out)
        typer.echo(f"wrote what was measured to {out}")
        raise
    _write_table(result, out)
    typer.echo(f"{metric.name}: clean {result.clean:.4f}, corrupted {result.corrupted:.4f}")
    typer.echo(result.top(top).to_string(index=False))
    written = [str(out)]
    try:
        figure = result.plot(backend="matplotlib", labels={"pos": pair.labels} if "pos" in result.axes else None)
    except MissingDependencyError as missing:
        typer.echo(f"no image: {missing}")
    else:
        image = out.with_suffix(".png")
        with replace_file(image) as draft:
            figure.savefig(draft, format="png")
        written.append(str(image))
    typer.echo(f"wrote {' and '.join(written)}")


def _check_out(out: Path) -> None:
    """Check before the work that its results have a place."""
    if not out.name:
        raise InputError(f"--out is {str(out)!r}, a folder; give the name of a file")
    if out.suffix == ".png":
        raise InputError(f"--out is {out}, the name of the image; give the table's, as {out.with_suffix('.csv')}")
    if not out.parent.is_dir():
        raise InputError(f"cannot write {out}: the folder {out.parent} does not exist")
    for path in (out, out.with_suffix(".png")):
        if path.exists() and not path.is_file():
            raise InputError(f"cannot write {path}: it is no regular file")


def _write_table(result: SweepResult, out: Path) -> None:
    with replace_file(out) as draft:
        result.to_dataframe().to_csv(draft, index=False)
