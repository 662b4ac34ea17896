"""The methods by name: `simple_average`, `weighted_average`, `slerp`, `task_arithmetic`, `ties_merging`, `dare`."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import Reader, optional, read_flag, read_number, read_one_of, read_seed, reads, require
from hooklens.errors import HookLensError, InputError
from hooklens.weights.merging.formulas import Agreement, average, drop, merge_agreeing
from hooklens.weights.merging.formulas import slerp as slerp_between
from hooklens.weights.merging.operands import Operands, Tensors
from hooklens.weights.merging.trimming import Trim, find_trim

Deltas = Callable[[int, str], Float[Tensor, "..."]]
"""Gives one model's task vector at one weight: what training changed, `theta_i - theta_base`."""

Thinned = Literal["simple_average", "task_arithmetic", "ties_merging"]
"""The methods that merge what `dare` has thinned."""


def _read_models(given: object, *, what: str, error: type[HookLensError] = InputError) -> list[Tensors]:
    expected = "a list of models: of each the tensors by name"
    listed: list[Any] = list(require(given, what=what, kind=(list, tuple), expected=expected, error=error))
    return [require(one, what=f"{what}[{i}]", kind=Mapping, expected="tensors by name", error=error)
            for i, one in enumerate(listed)]  # fmt: skip


def _read_weights(given: object, *, what: str, error: type[HookLensError] = InputError) -> list[float]:
    expected = "a list with a finite number for each model"
    listed: list[Any] = list(require(given, what=what, kind=(list, tuple), expected=expected, error=error))
    return [read_number(one, what=f"{what}[{i}]", expected="a finite number", error=error)
            for i, one in enumerate(listed)]  # fmt: skip


_READ_TENSORS = partial(require, kind=Mapping, expected="tensors by name")
_READ_FINITE = partial(read_number, expected="a finite number")
_READERS: dict[str, Reader] = {
    "models": _read_models,
    "base": _READ_TENSORS,
    "scaling_factor": _READ_FINITE,
}
_TIES_READERS: dict[str, Reader] = {
    **_READERS,
    "density": partial(read_number, expected="a number from 0 to 1", allows=lambda number: 0 <= number <= 1),
    "agreement": partial(read_one_of, options=get_args(Agreement)),
}


@reads(models=_read_models)
def simple_average(models: Sequence[Tensors]) -> dict[str, Tensor]:
    """`sum_i theta_i / n`.

    Args:
        models: tensors of each model by name. Sums are taken in float64, and what comes back has the dtypes of the
            first model.

    Raises:
        InputError: the models do not have the same tensors, listed by name and shape.
    """
    return _merge(models, lambda operands: partial(_average, operands, [1 / len(models)] * len(models)))


@reads(models=_read_models, weights=_read_weights, normalize=read_flag)
def weighted_average(
    models: Sequence[Tensors], weights: Sequence[float], *, normalize: bool = True
) -> dict[str, Tensor]:
    """`sum_i w_i theta_i`.

    Args:
        models: as in `simple_average`.
        weights: one number for each model.
        normalize: divide the weights by their sum.

    Raises:
        InputError: the models do not have the same tensors, or there are not as many weights, or these add up to 0.
    """
    if len(weights) != len(models):
        raise InputError(f"weights has {len(weights)} numbers for {len(models)} models; expected one for each model")
    total = sum(weights) if normalize else 1.0
    if total == 0:
        raise InputError("weights add up to 0, so they cannot be normalised; give others, or normalize=False")
    return _merge(models, lambda operands: partial(_average, operands, [weight / total for weight in weights]))


@reads(first=_READ_TENSORS, second=_READ_TENSORS, t=_READ_FINITE)
def slerp(first: Tensors, second: Tensors, t: float = 0.5) -> dict[str, Tensor]:
    """Each weight on the arc from one model's to the other's, see `formulas.slerp`.

    Args:
        first: tensors by name; what `t=0` gives.
        second: what `t=1` gives.
        t: how far along the arc.

    Raises:
        InputError: the models do not have the same tensors.
    """

    def prepare(operands: Operands) -> Callable[[str], Tensor]:
        one, other = operands.models
        return lambda name: slerp_between(one[name].double(), other[name].double(), t)

    return _merge([first, second], prepare)


@reads(**_READERS)
def task_arithmetic(base: Tensors, models: Sequence[Tensors], *, scaling_factor: float = 0.3) -> dict[str, Tensor]:
    """`theta_base + s * sum_i (theta_i - theta_base)` (Ilharco et al. 2023).

    Args:
        base: tensors by name of the model that the others were trained from.
        models: those.
        scaling_factor: `s`; negative to unlearn.

    Raises:
        InputError: the models do not have the same tensors.
    """
    return _merge_deltas(base, models, scaling_factor, lambda operands, deltas: partial(_add_up, operands, deltas))


@reads(**_TIES_READERS)
def ties_merging(
    base: Tensors,
    models: Sequence[Tensors],
    *,
    scaling_factor: float = 1.0,
    density: float = 0.2,
    agreement: Agreement = "mean",
) -> dict[str, Tensor]:
    """Task vectors trimmed, a sign elected for each entry, and those that agree put together (Yadav et al. 2023).

    Args:
        base: as in `task_arithmetic`.
        models: as there.
        scaling_factor: of what is added to the base; the paper's lambda.
        density: the share of a task vector's entries that stays, over all weights together: exactly
            `int(density * entries)` of them, the largest in size.
        agreement: how those that agree are put together.

    Raises:
        InputError: the models do not have the same tensors.
    """
    return _merge_deltas(base, models, scaling_factor, partial(_elect, density=density, agreement=agreement))


@reads(
    models=_read_models,
    base=_READ_TENSORS,
    **{name: optional(_TIES_READERS[name]) for name in ("scaling_factor", "density", "agreement")},
    sparsity=partial(read_number, expected="a number from 0 to below 1", allows=lambda number: 0 <= number < 1),
    rescale=read_flag,
    then=partial(read_one_of, options=get_args(Thinned)),
    seed=read_seed,
)
def dare(
    base: Tensors,
    models: Sequence[Tensors],
    *,
    sparsity: float = 0.5,
    rescale: bool = True,
    then: Thinned = "task_arithmetic",
    scaling_factor: float | None = None,
    density: float | None = None,
    agreement: Agreement | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Entries of task vectors dropped at random before a merge (Yu et al. 2024).

    Args:
        base: as in `task_arithmetic`.
        models: as there.
        sparsity: the chance of an entry to be dropped.
        rescale: divide what stays by `1 - sparsity`, so that the mean stays.
        then: the method that merges the rest; `"simple_average"` adds the mean of the task vectors to the base.
        scaling_factor: for `"task_arithmetic"` and `"ties_merging"`, as there; None: their own default.
        density: for `"ties_merging"`, as there.
        agreement: for `"ties_merging"`, as there.
        seed: of the draws. They are made for each weight and model apart: the order of weights changes none.

    Raises:
        InputError: the models do not have the same tensors, or an option is none of the chosen method's.
    """
    _refuse_unused(then, scaling_factor=scaling_factor, density=density, agreement=agreement)
    defaults = {"simple_average": 1 / max(1, len(models)), "task_arithmetic": 0.3, "ties_merging": 1.0}
    scale = defaults[then] if scaling_factor is None else scaling_factor

    def prepare(operands: Operands, deltas: Deltas) -> Callable[[str], Tensor]:
        def thin(model: int, name: str) -> Tensor:
            digest = hashlib.sha256(f"{seed} {model} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
            return drop(deltas(model, name), sparsity, generator, rescale=rescale)

        if then != "ties_merging":
            return partial(_add_up, operands, thin)
        return _elect(
            operands,
            thin,
            density=0.2 if density is None else density,
            agreement="mean" if agreement is None else agreement,
        )

    return _merge_deltas(base, models, scale, prepare)


def _refuse_unused(then: Thinned, **options: object) -> None:
    own = {"simple_average": (), "task_arithmetic": ("scaling_factor",), "ties_merging": tuple(options)}[then]
    unused = [name for name, value in options.items() if value is not None and name not in own]
    if unused:
        raise InputError(f"{', '.join(unused)} is no option of then={then!r}; leave it out, or take another method")


def _merge(
    models: Sequence[Tensors], prepare: Callable[[Operands], Callable[[str], Tensor]], *, base: Tensors | None = None
) -> dict[str, Tensor]:
    """All weights merged, one after another."""
    given = [*models] if base is None else [base, *models]
    labels = [f"models[{i}]" for i in range(len(models))]
    if not models:
        raise InputError("models is empty; expected at least one model")
    operands = Operands.of(given, labels if base is None else ["base", *labels])
    merge_weight = prepare(operands)
    with torch.no_grad():
        return operands.outcome({name: operands.cast(name, merge_weight(name)) for name in operands.names})


def _merge_deltas(
    base: Tensors,
    models: Sequence[Tensors],
    scaling_factor: float,
    prepare: Callable[[Operands, Deltas], Callable[[str], Tensor]],
) -> dict[str, Tensor]:
    """The base with merged task vectors added."""

    def merger(operands: Operands) -> Callable[[str], Tensor]:
        def delta(model: int, name: str) -> Tensor:
            return operands.models[model + 1][name].double() - operands.models[0][name].double()

        merge_delta = prepare(operands, delta)
        return lambda name: operands.models[0][name].double().add(merge_delta(name), alpha=scaling_factor)

    return _merge(models, merger, base=base)


def _average(operands: Operands, shares: list[float], name: str) -> Tensor:
    return average(operands.each(name), shares)


def _add_up(operands: Operands, deltas: Deltas, name: str) -> Tensor:
    n_models = len(operands.models) - 1
    return average((deltas(model, name) for model in range(n_models)), [1.0] * n_models)


def _elect(operands: Operands, deltas: Deltas, *, density: float, agreement: Agreement) -> Callable[[str], Tensor]:
    """The merge of trimmed task vectors; weights are asked for in the order of `operands.names`."""
    n_entries = sum(operands.models[0][name].numel() for name in operands.names)

    def all_of(model: int) -> Iterable[Tensor]:
        return (deltas(model, name) for name in operands.names)

    trims = [find_trim(partial(all_of, model), int(density * n_entries)) for model in range(len(operands.models) - 1)]
    return lambda name: merge_agreeing(list(_trim_each(trims, deltas, name)), agreement)


def _trim_each(trims: Sequence[Trim], deltas: Deltas, name: str) -> Iterator[Tensor]:
    return (trim(deltas(model, name)) for model, trim in enumerate(trims))
