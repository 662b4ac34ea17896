"""Scores of units: what each entry of an activation does for a behaviour.

With `a` a unit's activation on the clean prompt, `a'` its ablated value and `m` the metric,

    score = s * sum over positions of (a - a') . dm/da          method="atp", to first order
    score = s * (m - m with the unit ablated at all positions)  method="exact", one run for each unit

where `s` is 1 where the metric is larger on the clean prompts than on the corrupted ones, and -1 otherwise, so that a
score above 0 says that the unit works for the behaviour (attribution patching, Nanda 2023; of neurons and latents,
Marks et al. 2024, "Sparse Feature Circuits").
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import read_one_of, reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.hooks.splice import Splice
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.units.circuit import UnitScores
from hooklens.patching.units.ground import UnitAblation, UnitGround, UnitRunner
from hooklens.progress import progress_bar


@reads()
@torch.inference_mode(mode=False)
def score_units(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    names: Sequence[str] | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    method: Literal["atp", "exact"] = "atp",
    splices: Sequence[Splice] = (),
    ablation: UnitAblation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> UnitScores:
    """Score every unit of some hook points.

    Args:
        model: the model; its parameters' gradients are neither needed nor changed.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        names: hook points whose activations are `[batch pos unit]`: `"blocks.0.mlp.hook_post"` for neurons, a splice's
            `"blocks.0.hook_mlp_out.hook_sae_acts"` for latents.
        metric: as for a sweep; differentiable but for `method="exact"`.
        method: how units are scored, see the module.
        splices: autoencoders and the like, which act in every run.
        ablation: what is put in the place of a unit's own value: that on the corrupted prompt (`"resample"`), its mean
            over the corrupted prompts (`"mean"`), 0 (`"zero"`), or tensors by hook name.
        batch_size: rows run at once; `"auto"`: some thousand tokens.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: names or an ablation that are none, or prompts that do not go together.
        HookNameError: the model and the splices have no such hook point.
        SiteError: activations with other axes.
        MetricError: the metric is NaN or infinite for an unpatched run, or has no gradient.
        HookLensError: both unpatched runs have the same metric, so that nothing works for or against a difference.
    """
    refuse_missing("score_units", names=names, metric=metric)
    assert names is not None
    assert metric is not None
    options = RunOptions.read(model, batch_size=batch_size, progress=progress, allow_training=allow_training)
    how = read_one_of(method, what="score_units: method", options=("atp", "exact"))
    points = read_names(names, "score_units")
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    runner = UnitRunner(
        model, prompts, points, as_metric(metric).encode(model), splices=splices, ablation=ablation,
        batch_size=options.batch_size,
    )  # fmt: skip
    totals: dict[str, Tensor] = {}
    side = 0.0
    with progress_bar("scoring units", total=len(prompts), unit="pair", progress=options.progress) as bar:
        for pairs in runner.groups():
            ground = runner.prepare(pairs)
            side += float((ground.clean - ground.corrupted).double().sum())
            found = _estimate(runner, ground) if how == "atp" else _try_each(runner, ground)
            for name, part in found.items():
                totals[name] = totals[name] + part if name in totals else part
            bar.update(len(pairs))
    if side == 0:
        raise HookLensError(
            f"score_units: the clean and the corrupted run have the same {runner.metric.name}; no unit can work for or "
            "against what tells them apart"
        )
    sign = 1.0 if side > 0 else -1.0
    scores = {name: (sign * total / len(prompts)).to(model.dtype) for name, total in totals.items()}
    return UnitScores(scores=scores, metric=runner.metric.name, method=how, ablation=runner.ablation_name)


def read_names(given: object, what: str) -> list[str]:
    """Hook points, each once.

    Raises:
        InputError: no list of texts, or an empty one.
    """
    listed = [] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise InputError(f"{what}: names are {show(given)}; expected a list of hook points' full names")
    return list(dict.fromkeys(listed))


def _estimate(runner: UnitRunner, ground: UnitGround) -> dict[str, Tensor]:
    """To first order, summed over pairs."""
    gradients = runner.gradients(ground)
    return {
        name: ((ground.own[name] - ground.ablated[name]) * gradients[name]).double().sum((0, 1))
        for name in runner.names
    }


@torch.no_grad()
def _try_each(runner: UnitRunner, ground: UnitGround) -> dict[str, Tensor]:
    """One run for each unit, summed over pairs."""
    widths = {name: own.shape[-1] for name, own in ground.own.items()}
    found = {}
    for name, width in widths.items():
        parts = []
        for some in torch.split(torch.arange(width), runner.circuits_per_pass(ground)):
            masks = {other: torch.ones(len(some), widths[other], dtype=torch.bool) for other in runner.names}
            masks[name][torch.arange(len(some)), some] = False
            parts.append((ground.clean - runner.measure(ground, masks)).double().sum(1))
        found[name] = torch.cat(parts)
    return found
