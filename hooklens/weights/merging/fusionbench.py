"""Merges with the numbers of FusionBench 0.2, bit for bit, on state dicts of transformers' models.

What it does otherwise than the formulas of this package, and is kept here:

- All is computed in the dtype of the weights, sums one model after another.
- In `ties_merging` a task vector holds every entry of the state dict: a tied unembedding twice, buffers too. Of its
  `d` entries those stay that are no smaller than the `d - int(d * density)` smallest one: `int(d * density) + 1` of
  them, and all that are as large as the smallest of these.
- Where no sign is elected for an entry, it is the one that most entries have.
- In `dare`, what torch's generator draws goes to the weights of one model after another, in the module's order.

It fails on a density of 1, which is refused here.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.errors import InputError
from hooklens.weights.merging.formulas import Agreement
from hooklens.weights.merging.kinds import shared_names

State = Mapping[str, Tensor]

Merge = Callable[..., dict[str, Tensor]]
"""Merges state dicts, and the base's where there is one."""


def simple_average(models: Sequence[State]) -> dict[str, Tensor]:
    """`(theta_1 + theta_2 + ...) / n`."""
    return {name: _average([model[name] for model in models]) for name in models[0]}


def task_arithmetic(models: Sequence[State], base: State, *, scaling_factor: float) -> dict[str, Tensor]:
    """`theta_base + s * ((theta_1 - theta_base) + (theta_2 - theta_base) + ...)`."""
    merged = {}
    for name, start in base.items():
        total = models[0][name] - start
        for model in models[1:]:
            total = total + (model[name] - start)
        merged[name] = (start + scaling_factor * total).to(start.dtype)
    return merged


def ties_merging(
    models: Sequence[State], base: State, *, scaling_factor: float, density: float, agreement: Agreement
) -> dict[str, Tensor]:
    """Task vectors of whole state dicts trimmed, signs elected, entries that agree put together.

    Raises:
        InputError: a density of 1.
    """
    start = _flatten(base)
    deltas = torch.stack([_flatten(model) for model in models]) - start
    return _add_elected(base, start, deltas, scaling_factor=scaling_factor, density=density, agreement=agreement)


def dare(
    models: Sequence[State],
    base: State,
    *,
    sparsity: float,
    rescale: bool,
    scaling_factor: float,
    density: float | None,
    agreement: Agreement,
    seed: int,
) -> dict[str, Tensor]:
    """Entries of task vectors dropped, and the rest added up; or with a density merged as `ties_merging` does.

    Raises:
        InputError: a density of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    same = shared_names(base)
    names = [name for name, tensor in base.items() if name not in same and tensor.is_floating_point()]
    thinned = []
    for model in models:
        deltas = {name: _thin(model[name] - base[name], sparsity, generator, rescale=rescale) for name in names}
        # A tied weight is one tensor, and stands in the state dict under all of its names.
        thinned.append({name: deltas.get(same.get(name, name), torch.zeros_like(base[name])) for name in base})
    if density is not None:
        flat = torch.stack([_flatten(delta) for delta in thinned])
        return _add_elected(
            base, _flatten(base), flat, scaling_factor=scaling_factor, density=density, agreement=agreement
        )
    merged = {}
    for name, start in base.items():
        total = torch.zeros_like(start)
        for delta in thinned:
            total += delta[name]
        merged[name] = start + (total * scaling_factor).to(start.dtype)
    return merged


def cast(state: State, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The floating-point tensors in a dtype, as models are loaded in; those that share memory share it again."""
    same = shared_names(state)
    made: dict[str, Tensor] = {}
    for name, tensor in state.items():
        is_cast = dtype is not None and tensor.is_floating_point()
        made[name] = made[same[name]] if name in same else tensor.to(dtype) if is_cast else tensor
    return made


def _average(tensors: Sequence[Tensor]) -> Tensor:
    first, *others = tensors
    if not first.is_floating_point():
        return first
    total = first
    for tensor in others:
        total = total + tensor
    return (total / len(tensors)).to(first.dtype)


def _thin(delta: Tensor, sparsity: float, generator: torch.Generator, *, rescale: bool) -> Tensor:
    drawn = torch.rand(delta.shape, generator=generator, dtype=delta.dtype)
    thinned = delta * (drawn > sparsity).to(delta.device)
    return thinned / (1 - sparsity) if rescale else thinned


def _flatten(state: State) -> Float[Tensor, " entry"]:
    """All entries in the order of sorted names."""
    return torch.cat([state[name].reshape(-1) for name in sorted(state)])


def _add_elected(
    base: State,
    start: Float[Tensor, " entry"],
    deltas: Float[Tensor, "model entry"],
    *,
    scaling_factor: float,
    density: float,
    agreement: Agreement,
) -> dict[str, Tensor]:
    whole = start + scaling_factor * _elect(_trim(deltas, density), agreement)
    names = sorted(base)
    parts = torch.split(whole, [base[name].numel() for name in names])
    made = {name: part.view_as(base[name]).to(base[name].dtype) for name, part in zip(names, parts, strict=True)}
    return {name: made[name] for name in base}


def _trim(deltas: Float[Tensor, "model entry"], density: float) -> Float[Tensor, "model entry"]:
    n_entries = deltas.shape[1]
    place = n_entries - int(n_entries * density)
    if place == 0:
        raise InputError(
            f"density is {density} with compat='fusionbench', which fails where all entries stay; give a smaller one, "
            "or leave compat out"
        )
    smallest = deltas.abs().kthvalue(place, dim=1, keepdim=True).values
    # A product: what is dropped keeps the sign of its 0.
    return deltas * (deltas.abs() >= smallest)


def _elect(deltas: Float[Tensor, "model entry"], agreement: Agreement) -> Float[Tensor, " entry"]:
    signs = deltas.sum(0).sign()
    signs[signs == 0] = signs.sum().sign()
    agreeing = deltas * torch.where(signs > 0, deltas > 0, deltas < 0)
    if agreement == "sum":
        return agreeing.sum(0)
    if agreement == "max":
        return agreeing.abs().max(0).values * signs
    return agreeing.sum(0) / (agreeing != 0).sum(0).float().clamp(min=1)
