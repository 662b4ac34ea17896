"""Activations to put in that come from a data set: its mean, or examples drawn from it.

A patch with the other prompt's activation asks what a site carries about the difference of two prompts. Two other
questions need a whole data set (Wang et al. 2022; Chan et al. 2022, "Causal Scrubbing"):

- the mean over prompts takes away all in which they differ, and keeps what they share, such as their grammar;
- an example drawn at random puts in a value that the model really sees, where the mean may be one that it never
  does.

Both give tensors by hook name for the argument `source` of `patching.sweep`:

    source = patching.mean_activations(model, prompts, "z")
    result = patching.sweep(model, clean, corrupted, "z", metric, source=source)
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import reads
from hooklens.axes import find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.names import select_names
from hooklens.patching.errors import SiteError
from hooklens.patching.pairs.prompts import Prompt, read_prompts
from hooklens.patching.runs.sites import Grid, Sites


@reads()
def mean_activations(
    model: HookedCausalLM,
    prompts: Prompt,
    sites: Sites,
    *,
    each_position: bool = True,
    batch_size: int = 32,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[str, Tensor]:
    """Means over prompts, `[1 pos ...]` by hook name; summed in float64.

    Args:
        model: the model.
        prompts: text, a list of texts, or token ids.
        sites: as for a sweep; all their layers, positions and heads are given.
        each_position: one mean for each position, for prompts of one length in which positions mean the same.
            False: one for all, over prompts of any length.
        batch_size: prompts run at once.
        attention_mask: real tokens (1) of padded ids.

    Raises:
        HookNameError: a site that the model does not have.
        SiteError: a single mean for scores or patterns, whose axes are positions.
        InputError: prompts of different length, where each position has its mean.
    """
    names = _names_of(sites, model)
    rows = read_prompts(model, prompts, attention_mask)
    if each_position:
        _check_one_length(rows)
    else:
        _refuse_patterns(names)
    sums: dict[str, Tensor] = {}
    n_summed = 0
    for batch in _batches(rows, batch_size):
        found = _run(model, batch, names)
        n_summed += len(batch) if each_position else batch.numel()
        axes = [0] if each_position else [0, 1]
        for name, tensor in found.items():
            part = tensor.sum(axes, keepdim=True, dtype=torch.float64)
            sums[name] = sums[name] + part if name in sums else part
    return {name: (total / n_summed).to(model.dtype) for name, total in sums.items()}


@reads()
def draw_activations(
    model: HookedCausalLM,
    prompts: Prompt,
    sites: Sites,
    *,
    n_pairs: int,
    seed: int,
    batch_size: int = 32,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> dict[str, Tensor]:
    """Activations of prompts drawn at random, `[n_pairs pos ...]` by hook name: one prompt for each pair of a sweep.

    Args:
        model: the model.
        prompts: text, a list of texts, or token ids, all of one length.
        sites: as for a sweep.
        n_pairs: how many are drawn; none twice while there are enough.
        seed: what is drawn.
        batch_size: prompts run at once.
        attention_mask: real tokens (1) of padded ids.

    Raises:
        HookNameError: a site that the model does not have.
        InputError: prompts of different length, or no pairs.
    """
    if n_pairs < 1:
        raise InputError(f"n_pairs is {n_pairs}; expected how many pairs the sweep has")
    names = _names_of(sites, model)
    rows = read_prompts(model, prompts, attention_mask)
    _check_one_length(rows)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(-(-n_pairs // len(rows)))])
    drawn = [rows[index] for index in order[:n_pairs].tolist()]
    parts = [_run(model, batch, names) for batch in _batches(drawn, batch_size)]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def fit_given(
    name: str, given: Tensor, like: Tensor, pairs: Sequence[int], *, n_pairs: int | None, width: int
) -> Float[Tensor, "pairs pos *rest"]:
    """A given activation in the shape that some pairs have.

    Args:
        name: the hook point.
        given: what broadcasts to the activations of all pairs.
        like: the activation of the pairs wanted.
        pairs: which pairs of the experiment these are.
        n_pairs: how many the experiment has; None: they come one after another, so all share one row.
        width: tokens of its longest prompt; these pairs may all be shorter.

    Raises:
        SiteError: another shape.
    """
    value = given.to(like)
    if value.ndim == like.ndim and len(value) != 1:
        if len(value) != n_pairs:
            expected = "1, since pairs come one after another" if n_pairs is None else f"1 or {n_pairs}"
            raise SiteError(f"the activation given for {name!r} has {len(value)} rows; expected {expected}")
        value = value[list(pairs)]
    site = find_site(name)
    assert site is not None
    for axis, axis_name in enumerate(site.axes, start=value.ndim - like.ndim):
        if axis_name in ("pos", "query", "key") and axis >= 0 and value.shape[axis] == width:
            value = value.narrow(axis, 0, like.shape[axis - value.ndim])
    try:
        return value.expand_as(like)
    except RuntimeError:
        raise SiteError(
            f"the activation given for {name!r} has shape {list(given.shape)}; expected what broadcasts to "
            f"[pairs pos ...], {list(like.shape)}"
        ) from None


def _names_of(sites: Sites, model: HookedCausalLM) -> list[str]:
    listed = [sites] if isinstance(sites, str | Grid) else list(sites)
    words = [site.site if isinstance(site, Grid) else site for site in listed]
    return select_names(words, model.hook_points(), n_layers=model.cfg.n_layers)


def _check_one_length(rows: Sequence[Tensor]) -> None:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise InputError(
            f"prompts have {lengths} tokens, so their positions do not mean the same; give prompts of one length"
        )


def _refuse_patterns(names: Sequence[str]) -> None:
    refused = [name for name in names if (site := find_site(name)) is not None and "key" in site.axes]
    if refused:
        raise SiteError(f"one mean for all positions cannot be made of {refused}: their axes are positions themselves")


def _batches(rows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Rows of one length as batches of at most `batch_size`."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    by_length: dict[int, list[Tensor]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [
        torch.stack(same[first : first + batch_size])
        for same in by_length.values()
        for first in range(0, len(same), batch_size)
    ]


@torch.no_grad()
def _run(model: HookedCausalLM, tokens: Int[Tensor, "batch pos"], names: list[str]) -> dict[str, Tensor]:
    with model.capture(names) as captured:
        model.run(tokens, model.make_plan(tokens))
    return dict(captured)
