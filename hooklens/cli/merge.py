"""`hooklens merge`: several models put together into one, weight by weight."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hooklens.causal_lm import HookedCausalLM
from hooklens.cli.convert import DType
from hooklens.display.numbers import format_bytes
from hooklens.errors import InputError
from hooklens.pool import CausalLMPool
from hooklens.weights import merging


class Method(str, Enum):
    """The methods of `hooklens.weights.merging`."""

    simple_average = "simple_average"
    weighted_average = "weighted_average"
    slerp = "slerp"
    task_arithmetic = "task_arithmetic"
    ties_merging = "ties_merging"
    dare = "dare"


class Agreement(str, Enum):
    """How entries that agree in sign are put together."""

    mean = "mean"
    sum = "sum"
    max = "max"


class Then(str, Enum):
    """The methods that merge what is left of task vectors."""

    simple_average = "simple_average"
    task_arithmetic = "task_arithmetic"
    ties_merging = "ties_merging"


class Compat(str, Enum):
    """Libraries whose numbers can be had."""

    fusionbench = "fusionbench"


_OPTIONS: dict[Method, tuple[str, ...]] = {
    Method.simple_average: ("compat",),
    Method.weighted_average: ("weights",),
    Method.slerp: ("t",),
    Method.task_arithmetic: ("scaling_factor", "compat"),
    Method.ties_merging: ("scaling_factor", "density", "agreement", "compat"),
    Method.dare: ("scaling_factor", "density", "agreement", "sparsity", "rescale", "then", "seed", "compat"),
}
_WITHOUT_BASE = (Method.simple_average, Method.weighted_average, Method.slerp)
# What an entry of a pool may say beside its path so that the folder is all of it.
_PLAIN = frozenset({"_target_", "pretrained_model_name_or_path", "source", "torch_dtype", "dtype"})


def merge(
    config: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="A YAML file of a pool: its models, and its _pretrained_ as the base."),
    ] = None,
    *,
    method: Annotated[Method, typer.Option(help="How to merge.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    base: Annotated[str | None, typer.Option(help="In place of CONFIG: what the models were trained from.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="In place of CONFIG: a folder or hub name; give it for each model.")
    ] = None,
    scaling_factor: Annotated[float | None, typer.Option(help="Of what is added to the base.")] = None,
    density: Annotated[float | None, typer.Option(help="The share of a task vector that ties_merging keeps.")] = None,
    agreement: Annotated[
        Agreement | None, typer.Option(help="How ties_merging puts together what agrees in sign.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="The share of a task vector that dare drops.")] = None,
    rescale: Annotated[
        bool | None, typer.Option("--rescale/--no-rescale", help="Whether dare divides the rest by 1 - sparsity.")
    ] = None,
    then: Annotated[Then | None, typer.Option(help="What merges the rest in dare.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare drops.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of weighted_average, a number for each model: 0.5,0.3,0.2.")
    ] = None,
    t: Annotated[float | None, typer.Option(help="How far slerp goes from the first of two models.")] = None,
    dtype: Annotated[
        DType, typer.Option(help="Dtype of the weights; auto: as the pool says, or else the base's.")
    ] = DType.auto,
    compat: Annotated[Compat | None, typer.Option(help="Give the numbers of another library bit for bit.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a checkpoint that stands in the folder.")] = False,
) -> None:
    """Merge models into one folder that transformers loads; one piece of a weight at a time is in memory.

    The models are those of CONFIG, or each a --model.
    """
    if (out / "config.json").exists() and not overwrite:
        raise InputError(f"{out} already holds a checkpoint; choose another folder, or pass --overwrite")
    given = {
        "scaling_factor": scaling_factor,
        "density": density,
        "agreement": None if agreement is None else agreement.value,
        "sparsity": sparsity,
        "rescale": rescale,
        "then": None if then is None else then.value,
        "seed": seed,
        "weights": None if weights is None else _read_numbers(weights),
        "t": t,
        "compat": None if compat is None else compat.value,
    }
    options = {name: value for name, value in given.items() if value is not None}
    if unused := [f"--{name.replace('_', '-')}" for name in options if name not in _OPTIONS[method]]:
        raise InputError(f"{', '.join(unused)} is no option of --method {method.value}; leave it out")
    start, models, said = _find_models(config, base, model or [])
    chosen = said if dtype is DType.auto else getattr(torch, dtype.value)
    arguments = _arrange(method, start, models)
    if all(isinstance(one, str) for one in (*models, start or "")):
        _run(method, arguments, {**options, "out": out, "dtype": chosen})
    else:
        _run(method, arguments, {**options, "dtype": chosen}).save_pretrained(out)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    typer.echo(f"wrote {out}: {len(models)} models merged, {format_bytes(written)} of safetensors files")


def _run(method: Method, arguments: list[Any], options: Mapping[str, Any]) -> Any:
    return getattr(merging, method.value)(*arguments, **options)


def _read_numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"--weights is {text!r}; expected a number for each model, as 0.5,0.3,0.2") from error


def _find_models(config: Path | None, base: str | None, models: list[str]) -> tuple[Any, list[Any], Any]:
    """The base, the models, and the dtype that a pool asks for."""
    if (config is None) == (base is None and not models):
        raise InputError("give CONFIG, a pool's YAML file, or --model for each model with --base where there is one")
    if config is None:
        return base, list(models), None
    pool = CausalLMPool.from_yaml(config)
    kwargs = pool.model_kwargs
    said = kwargs.get("torch_dtype", kwargs.get("dtype"))
    names = [*(["_pretrained_"] if pool.has_pretrained else []), *pool.model_names]
    entries = pool.config["models"]
    are_folders = all(_is_plain(entries[name]) for name in names) and set(kwargs) <= _PLAIN
    # Models with an adapter, of a revision or the like are more than their folders say.
    found = [pool.get_model_path(name) if are_folders else _load(pool, name) for name in names]
    start = found.pop(0) if pool.has_pretrained else None
    return start, found, None if said in (None, "auto") else said


def _is_plain(entry: object) -> bool:
    return isinstance(entry, str) or (
        isinstance(entry, Mapping)
        and entry.keys() <= _PLAIN
        and str(entry.get("_target_", "transformers.")).startswith("transformers.")
    )


def _load(pool: Any, name: str) -> HookedCausalLM:
    model = pool.load_model(name, hooked=True, lazy=False)
    assert isinstance(model, HookedCausalLM)
    return model


def _arrange(method: Method, base: Any, models: list[Any]) -> list[Any]:
    """What the method takes before its options."""
    if method is Method.slerp:
        if len(models) != 2:
            raise InputError(f"--method slerp merges two models, and {len(models)} are given")
        return models
    if method in _WITHOUT_BASE:
        return [models]
    if base is None:
        raise InputError(
            f"--method {method.value} needs the model that the others were trained from: --base, or _pretrained_ in "
            "the pool"
        )
    return [base, models]
