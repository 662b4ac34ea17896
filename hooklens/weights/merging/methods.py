"""The methods by name: `simple_average`, `weighted_average`, `slerp`, `task_arithmetic`, `ties_merging`, `dare`."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from hooklens.arguments import (
    Reader,
    optional,
    read_dtype,
    read_flag,
    read_number,
    read_one_of,
    read_path,
    read_seed,
    reads,
    require,
)
from hooklens.errors import HookLensError, InputError
from hooklens.progress import progress_bar
from hooklens.weights.merging import fusionbench
from hooklens.weights.merging.formulas import Agreement
from hooklens.weights.merging.kinds import Target, check_kind
from hooklens.weights.merging.operands import Operands
from hooklens.weights.merging.recipes import DeltaRecipe, Recipe, add_deltas, add_up, elect, thin, turn, weigh
from hooklens.weights.merging.trimming import N_LOOKS

Merged = Any
"""What a merge gives, of the kind that was merged: tensors by name, the path of the folder, or a HookedCausalLM."""

Thinned = Literal["simple_average", "task_arithmetic", "ties_merging"]
"""The methods that merge what `dare` has thinned."""

Compat = Literal["fusionbench"]
"""Libraries whose results can be had bit for bit."""


def _read_models(given: object, *, what: str, error: type[HookLensError] = InputError) -> list[Any]:
    expected = "a list of models: of each tensors by name, a checkpoint folder, or a HookedCausalLM"
    listed: list[Any] = list(require(given, what=what, kind=(list, tuple), expected=expected, error=error))
    return [check_kind(one, what=f"{what}[{i}]", error=error) for i, one in enumerate(listed)]


def _read_weights(given: object, *, what: str, error: type[HookLensError] = InputError) -> list[float]:
    expected = "a list with a finite number for each model"
    listed: list[Any] = list(require(given, what=what, kind=(list, tuple), expected=expected, error=error))
    return [read_number(one, what=f"{what}[{i}]", expected="a finite number", error=error)
            for i, one in enumerate(listed)]  # fmt: skip


_READ_FINITE = partial(read_number, expected="a finite number")
_TARGET: dict[str, Reader] = {
    "out": optional(read_path),
    "dtype": optional(read_dtype),
    "progress": read_flag,
}
_COMPAT: dict[str, Reader] = {"compat": partial(read_one_of, options=(*get_args(Compat), None))}
_READERS: dict[str, Reader] = {
    **_TARGET,
    **_COMPAT,
    "models": _read_models,
    "base": check_kind,
    "scaling_factor": optional(_READ_FINITE),
}
_TIES_READERS: dict[str, Reader] = {
    **_READERS,
    "density": partial(read_number, expected="a number from 0 to 1", allows=lambda number: 0 <= number <= 1),
    "agreement": optional(partial(read_one_of, options=get_args(Agreement))),
}


@reads(models=_read_models, **_TARGET, **_COMPAT)
def simple_average(
    models: Sequence[Any],
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    compat: Compat | None = None,
    progress: bool = True,
) -> Merged:
    """`sum_i theta_i / n`.

    Args:
        models: all in one form: tensors by name, checkpoint folders (or names on the hub), or `HookedCausalLM`s. What
            comes back is of that form. Sums are taken in float64.
        out: the folder to write, of a merge of folders, where it has to be given.
        dtype: of what comes back; None: of each weight that of the first model. With `compat` models are brought to it
            before they are merged, as that library loads them.
        compat: `"fusionbench"`: the numbers of FusionBench 0.2, bit for bit; see `fusionbench`.
        progress: show a bar where it takes long.

    Raises:
        InputError: the models are of several kinds, or do not have the same tensors, listed by name and shape; or
            what they are cannot be merged: processed or quantised weights.
        CheckpointError: a folder is no checkpoint, or `out` cannot be written.
    """
    target = Target(out, dtype)  # type: ignore[arg-type]  # as read
    if compat is not None:
        return _merge_as_there(None, models, fusionbench.simple_average, target)
    n_models = len(models)
    recipe = partial(weigh, shares=[1 / max(1, n_models)] * n_models)
    return _merge(models, recipe, target, n_reads=n_models, progress=progress)


@reads(models=_read_models, weights=_read_weights, normalize=read_flag, **_TARGET)
def weighted_average(
    models: Sequence[Any],
    weights: Sequence[float],
    *,
    normalize: bool = True,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
) -> Merged:
    """`sum_i w_i theta_i`.

    Args:
        models: as in `simple_average`.
        weights: one number for each model.
        normalize: divide the weights by their sum.
        out: as in `simple_average`.
        dtype: as there.
        progress: as there.

    Raises:
        InputError: the models do not have the same tensors, or there are not as many weights, or these add up to 0.
    """
    if len(weights) != len(models):
        raise InputError(f"weights has {len(weights)} numbers for {len(models)} models; expected one for each model")
    total = sum(weights) if normalize else 1.0
    if total == 0:
        raise InputError("weights add up to 0, so they cannot be normalised; give others, or normalize=False")
    recipe = partial(weigh, shares=[weight / total for weight in weights])
    return _merge(models, recipe, Target(out, dtype), n_reads=len(models), progress=progress)  # type: ignore[arg-type]


@reads(first=check_kind, second=check_kind, t=_READ_FINITE, **_TARGET)
def slerp(
    first: Any,
    second: Any,
    t: float = 0.5,
    *,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    progress: bool = True,
) -> Merged:
    """Each weight on the arc from one model's to the other's, see `formulas.arc_shares`.

    Args:
        first: a model in one of the forms of `simple_average`; what `t=0` gives.
        second: what `t=1` gives.
        t: how far along the arc.
        out: as in `simple_average`.
        dtype: as there.
        progress: as there.

    Raises:
        InputError: the models do not have the same tensors.
    """
    target = Target(out, dtype)  # type: ignore[arg-type]  # as read
    return _merge([first, second], partial(turn, t=t), target, n_reads=6, progress=progress)


@reads(**_READERS)
def task_arithmetic(
    base: Any,
    models: Sequence[Any],
    *,
    scaling_factor: float | None = None,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    compat: Compat | None = None,
    progress: bool = True,
) -> Merged:
    """`theta_base + s * sum_i (theta_i - theta_base)` (Ilharco et al. 2023).

    Args:
        base: the model that the others were trained from, in one of the forms of `simple_average`.
        models: those.
        scaling_factor: `s`; negative to unlearn. None: 0.3.
        out: as in `simple_average`.
        dtype: as there; None: of each weight that of the base.
        compat: as there.
        progress: as there.

    Raises:
        InputError: the models do not have the same tensors.
    """
    scale = 0.3 if scaling_factor is None else scaling_factor
    target = Target(out, dtype)  # type: ignore[arg-type]  # as read
    if compat is not None:
        return _merge_as_there(base, models, partial(fusionbench.task_arithmetic, scaling_factor=scale), target)
    return _merge_deltas(base, models, scale, add_up, target, n_looks=1, progress=progress)


@reads(**_TIES_READERS)
def ties_merging(
    base: Any,
    models: Sequence[Any],
    *,
    scaling_factor: float | None = None,
    density: float = 0.2,
    agreement: Agreement | None = None,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    compat: Compat | None = None,
    progress: bool = True,
) -> Merged:
    """Task vectors trimmed, a sign elected for each entry, and those that agree put together (Yadav et al. 2023).

    Args:
        base: as in `task_arithmetic`.
        models: as there.
        scaling_factor: of what is added to the base; the paper's lambda. None: 1, with `compat` 0.3 as there.
        density: the share of a task vector's entries that stays, over all weights together: exactly
            `int(density * entries)` of them, the largest in size, of equal ones the first. With `compat` that
            library's `threshold / 100`.
        agreement: how those that agree are put together. None: the `"mean"`, with `compat` the `"sum"` as there.
        out: as in `simple_average`.
        dtype: as in `task_arithmetic`.
        compat: as in `simple_average`.
        progress: as there.

    Raises:
        InputError: the models do not have the same tensors.
    """
    target = Target(out, dtype)  # type: ignore[arg-type]  # as read
    if compat is not None:
        merge = partial(
            fusionbench.ties_merging,
            scaling_factor=0.3 if scaling_factor is None else scaling_factor,
            density=density,
            agreement=agreement or "sum",
        )
        return _merge_as_there(base, models, merge, target)
    scale = 1.0 if scaling_factor is None else scaling_factor
    recipe = partial(elect, density=density, agreement=agreement or "mean")
    return _merge_deltas(base, models, scale, recipe, target, n_looks=N_LOOKS + 1, progress=progress)


@reads(
    **{**_TIES_READERS, "density": optional(_TIES_READERS["density"])},
    sparsity=partial(read_number, expected="a number from 0 to below 1", allows=lambda number: 0 <= number < 1),
    rescale=read_flag,
    then=partial(read_one_of, options=get_args(Thinned)),
    seed=read_seed,
)
def dare(
    base: Any,
    models: Sequence[Any],
    *,
    sparsity: float = 0.5,
    rescale: bool = True,
    then: Thinned = "task_arithmetic",
    scaling_factor: float | None = None,
    density: float | None = None,
    agreement: Agreement | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    compat: Compat | None = None,
    progress: bool = True,
) -> Merged:
    """Entries of task vectors dropped at random before a merge (Yu et al. 2024).

    Args:
        base: as in `task_arithmetic`.
        models: as there.
        sparsity: the chance of an entry to be dropped.
        rescale: divide what stays by `1 - sparsity`, so that the mean stays.
        then: the method that merges the rest; `"simple_average"` adds the mean of the task vectors to the base.
        scaling_factor: for `"task_arithmetic"` and `"ties_merging"`, as there; None: their own default, with `compat`
            0.5 for `"ties_merging"` as there.
        density: for `"ties_merging"`, as there.
        agreement: for `"ties_merging"`, as there.
        seed: of the draws. They are made for each weight and model apart: the order of weights changes none, their
            names and layout do. With `compat` they are those that torch's own generator gives on the CPU after
            `torch.manual_seed(seed)`.
        out: as in `simple_average`.
        dtype: as in `task_arithmetic`.
        compat: as in `simple_average`.
        progress: as there.

    Raises:
        InputError: the models do not have the same tensors, or an option is none of the chosen method's.
    """
    _refuse_unused(then, scaling_factor=scaling_factor, density=density, agreement=agreement)
    target = Target(out, dtype)  # type: ignore[arg-type]  # as read
    defaults = {
        "simple_average": 1 / max(1, len(models)),
        "task_arithmetic": 0.3,
        "ties_merging": 1.0 if compat is None else 0.5,
    }
    scale = defaults[then] if scaling_factor is None else scaling_factor
    share = 0.2 if density is None else density
    if compat is not None:
        merge = partial(
            fusionbench.dare,
            sparsity=sparsity,
            rescale=rescale,
            scaling_factor=scale,
            density=share if then == "ties_merging" else None,
            agreement=agreement or "sum",
            seed=seed,
        )
        return _merge_as_there(base, models, merge, target)
    rest: DeltaRecipe = add_up
    if then == "ties_merging":
        rest = partial(elect, density=share, agreement=agreement or "mean")
    recipe = partial(thin, sparsity=sparsity, rescale=rescale, seed=seed, then=rest)
    n_looks = N_LOOKS + 1 if then == "ties_merging" else 1
    return _merge_deltas(base, models, scale, recipe, target, n_looks=n_looks, progress=progress)


def _refuse_unused(then: Thinned, **options: object) -> None:
    own = {"simple_average": (), "task_arithmetic": ("scaling_factor",), "ties_merging": tuple(options)}[then]
    unused = [name for name, value in options.items() if value is not None and name not in own]
    if unused:
        raise InputError(f"{', '.join(unused)} is no option of then={then!r}; leave it out, or take another method")


def _label(models: Sequence[Any], base: Any = None) -> tuple[list[Any], list[str]]:
    """Everything that is merged, the base first, and what messages call it."""
    if not models:
        raise InputError("models is empty; expected at least one model")
    labels = [f"models[{i}]" for i in range(len(models))]
    return ([*models], labels) if base is None else ([base, *models], ["base", *labels])


def _merge(
    models: Sequence[Any], recipe: Recipe, target: Target, *, n_reads: int, progress: bool, base: Any = None
) -> Merged:
    """All weights merged, one after another, each in pieces.

    Args:
        models: what is merged.
        recipe: how.
        target: what it is to give.
        n_reads: how many numbers are read for each of the outcome.
        progress: show a bar where it takes long.
        base: stands before the models.
    """
    given, labels = _label(models, base)
    with progress_bar("merging", unit="entry", scaled=True, progress=progress) as bar, torch.no_grad():
        operands = Operands.of(given, labels, bar.update)
        first = operands.models[0]
        first.check_target(target)
        bar.total = n_reads * operands.n_entries
        return first.build(operands.merged(recipe, target.dtype), target)


def _merge_deltas(
    base: Any,
    models: Sequence[Any],
    scaling_factor: float,
    recipe: DeltaRecipe,
    target: Target,
    *,
    n_looks: int,
    progress: bool,
) -> Merged:
    """The base with merged task vectors added, each of which is looked at so many times."""
    whole = partial(add_deltas, scaling_factor=scaling_factor, recipe=recipe)
    n_reads = 2 * len(models) * n_looks + 1
    return _merge(models, whole, target, n_reads=n_reads, progress=progress, base=base)


def _merge_as_there(base: Any, models: Sequence[Any], merge: fusionbench.Merge, target: Target) -> Merged:
    """All weights merged at once, as another library does."""
    given, labels = _label(models, base)
    operands = Operands.of(given, labels)
    first = operands.models[0]
    first.check_target(target)
    with torch.no_grad():
        states = [fusionbench.cast(operand.transformers_state(), target.dtype) for operand in operands.models]
        merged = merge(states) if base is None else merge(states[1:], states[0])
        return first.build_transformers(merged, target)
