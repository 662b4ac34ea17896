"""`hooklens patch`: activation patching over a grid of sites, as a table and an image."""

from pathlib import Path
from typing import Annotated

import typer

from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.arguments import Model
from hooklens.errors import MissingDependencyError
from hooklens.patching import LogitDiff, LogProb, Metric, Pair, sweep


def patch(
    model: Model,
    *,
    clean: Annotated[str, typer.Option(help="The prompt whose behaviour is studied.")],
    corrupted: Annotated[str, typer.Option(help="A prompt of as many tokens that behaves otherwise.")],
    answer: Annotated[str, typer.Option(help="The next token that the clean prompt calls for.")],
    wrong: Annotated[
        str | None,
        typer.Option(help="The corrupted prompt's answer; the metric is then the logit difference, else log p."),
    ] = None,
    site: Annotated[str, typer.Option(help="What to patch: resid_pre, z, mlp_out, pattern, ...")] = "resid_pre",
    noise: Annotated[bool, typer.Option("--noise", help="Patch the clean run instead of the corrupted one.")] = False,
    out: Annotated[
        Path, typer.Option(help="Where the table goes, as CSV; the image gets the same name with .png.")
    ] = Path("patching.csv"),
    top: Annotated[int, typer.Option(help="How many of the strongest cells to show.")] = 10,
) -> None:
    """Patch each site of one prompt's run with the other's activation, and tell what it does to the answer.

    The image is left out where the plot extra of HookLens is not installed.
    """
    metric: Metric = LogProb(answer) if wrong is None else LogitDiff(answer, wrong)
    loaded = HookedCausalLM.from_pretrained(model)
    pair = Pair.from_text(loaded, clean, corrupted)
    result = sweep(
        loaded,
        clean,
        corrupted,
        site,
        metric,
        direction="noise" if noise else "denoise",
    )
    result.to_dataframe().to_csv(out, index=False)
    typer.echo(f"{metric.name}: clean {result.clean:.4f}, corrupted {result.corrupted:.4f}")
    typer.echo(result.top(top).to_string(index=False))
    written = [str(out)]
    try:
        figure = result.plot(backend="matplotlib", labels={"pos": pair.labels} if "pos" in result.axes else None)
    except MissingDependencyError as missing:
        typer.echo(f"no image: {missing}")
    else:
        image = out.with_suffix(".png")
        figure.savefig(image)
        written.append(str(image))
    typer.echo(f"wrote {' and '.join(written)}")
