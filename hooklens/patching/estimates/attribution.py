"""Attribution patching: what every patch would do, estimated from one gradient.

Activation patching to first order (Nanda 2023, "Attribution Patching: Activation Patching At Industrial Scale"):
with `a` an activation of the run that is patched, `a'` its new value and `m` the metric,

    value(cell) = m + sum over the cell of (a' - a) * dm/da

so two forwards and one backward give an estimate for all cells at once (`method="atp"`). It is exact where the
rest of the network is linear in the patch, and fails where the gradient is flat, as in a saturated softmax.

`method="ig"` averages the gradient over runs whose input embeddings lie between those of the two prompts, at
fractions `(k + 1/2) / steps` of the way (integrated gradients, Sundararajan et al. 2017; Hanna et al. 2024, "Have
Faith in Faithfulness"), which sees past flat places at `steps` times the cost.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.axes import find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks import HookPoint
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.prompts import Prompt, PromptPairs, read_pairs
from hooklens.patching.results.result import SweepResult, SweepStats
from hooklens.patching.runs.baseline import Baseline, Direction, run_baseline
from hooklens.patching.runs.checks import check_model
from hooklens.patching.runs.sites import Cell, Sites, lay_out

Method = Literal["atp", "ig"]


@torch.inference_mode(mode=False)
def attribution(
    model: HookedCausalLM,
    clean: Prompt,
    corrupted: Prompt,
    sites: Sites,
    metric: Metric | MetricFunction,
    *,
    method: Method = "atp",
    steps: int = 8,
    direction: Direction = "denoise",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    allow_training: bool = False,
) -> SweepResult:
    """Estimate what `patching.sweep` would give, from gradients.

    Args:
        model: the model; its parameters' gradients are neither needed nor changed.
        clean: prompts whose behaviour is studied.
        corrupted: as many prompts of the same lengths.
        sites: as for a sweep.
        metric: as for a sweep; it must be differentiable.
        method: `"atp"`: the gradient of the run that is patched; `"ig"`: averaged on the way to the other run.
        steps: gradients averaged by `"ig"`.
        direction: which run is patched.
        attention_mask: real tokens (1) of padded ids, the same for both.
        allow_training: accept a model in training mode.

    Raises:
        InputError: prompts that do not go together, an unknown method, or a metric without a gradient.
    """
    check_model(model, allow_training=allow_training)
    fractions = list_fractions("attribution", method, ("atp", "ig"), steps)
    prompts = read_pairs(model, clean, corrupted, attention_mask)
    array = lay_out(sites, model, prompts.lengths)
    names = list(dict.fromkeys(cell.name for cell in array.cells))
    with torch.no_grad():
        baseline = run_baseline(
            model, prompts, range(len(prompts)), names, as_metric(metric), direction=direction, source="other"
        )
    gradients = average_gradients(model, prompts, baseline, names, fractions, direction=direction)
    effects = {
        name: effect_of(name, change_of(model, baseline, name, current), gradient)
        for name, (current, gradient) in gradients.items()
    }
    base = baseline.corrupted if direction == "denoise" else baseline.clean
    values = torch.stack([_sum_cell(effects[cell.name], cell, baseline.lengths) for cell in array.cells]) + base
    shape = [len(labels) for labels in array.axes.values()]
    # Both unpatched prompts are one forward.
    n_runs = 2 + len(fractions) + (method == "ig")
    n_tokens = sum(prompts.lengths)
    return SweepResult(
        per_pair=values.view(*shape, -1),
        axes=array.axes,
        clean_per_pair=baseline.clean,
        corrupted_per_pair=baseline.corrupted,
        cells=tuple(cell.describe() for cell in array.cells),
        metric=baseline.metric.name,
        direction=direction,
        stats=SweepStats(
            cells=len(array.cells),
            pairs=len(prompts),
            unchanged=0,
            forwards=n_runs - 1,
            tokens=n_runs * n_tokens,
            naive_forwards=(len(array.cells) + 2) * len(prompts),
            naive_tokens=(len(array.cells) + 2) * n_tokens,
        ),
    )


def list_fractions(subject: str, method: str, known: tuple[str, str], steps: int) -> list[float]:
    """How far on the way to the other run gradients are taken: nowhere, or at the middles of `steps` equal parts.

    Args:
        subject: what an error calls the experiment.
        method: one of the known ones.
        known: the method of one gradient, and that which averages.
        steps: gradients averaged.

    Raises:
        InputError: an unknown method, or no steps.
    """
    plain, averaged = known
    if method not in known or steps < 1:
        raise InputError(
            f"{subject}: method={method!r}, steps={steps}; expected {plain!r} or {averaged!r}, and steps >= 1"
        )
    return [0.0] if method == plain else [(k + 0.5) / steps for k in range(steps)]


def average_gradients(
    model: HookedCausalLM,
    prompts: PromptPairs,
    baseline: Baseline,
    names: Sequence[str],
    fractions: Sequence[float],
    *,
    direction: Direction,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Activations of the run that is patched, and the metric's gradient at them.

    Args:
        model: the model.
        prompts: all pairs.
        baseline: their unpatched runs.
        names: the hook points.
        fractions: how far the embeddings are moved to those of the other run; gradients are averaged over them.
        direction: which run is patched.

    Raises:
        InputError: the metric has no gradient.
    """
    into, other = (prompts.corrupted, prompts.clean) if direction == "denoise" else (prompts.clean, prompts.corrupted)
    columns = torch.arange(into.shape[1], device=into.device)
    mask = columns < torch.tensor(prompts.lengths, device=into.device)[:, None]
    with torch.no_grad(), model.capture("hook_embed") as captured:
        model.run(other, model.make_plan(other, mask), stop_at_layer=0)
    target = captured["hook_embed"]
    currents: dict[str, Tensor] = {}
    summed: dict[str, Tensor] = {}
    if fractions[0]:
        with torch.no_grad(), model.capture(list(names)) as unmoved:
            model.run(into, model.make_plan(into, mask))
        currents = dict(unmoved)
    for fraction in fractions:
        run = _GradientRun(target, fraction)
        hooks = [(name, run.leave_graph) for name in ("hook_embed", "hook_pos_embed") if name in model.hook_points()]
        with (
            torch.enable_grad(),
            model.hooks(hooks, [(list(names), run.keep_gradient)]),
            model.capture(list(names)) as now,
        ):
            stream = model.run(into, model.make_plan(into, mask), unembed=True)
            logits = stream.take_along_dim(baseline.reads[..., None], dim=1)
            value = baseline.metric.measure(logits[None])[0].sum()
            if not value.requires_grad:
                raise InputError(
                    f"metric {baseline.metric.name} has no gradient: attribution needs a differentiable one"
                )
            torch.autograd.grad(value, run.leaves)
        if not currents:
            currents = dict(now)
        for name in names:
            # A hook point that the metric does not depend on has gradient 0.
            gradient = run.gradients.get(name, torch.zeros_like(now[name])) / len(fractions)
            summed[name] = summed[name] + gradient if name in summed else gradient
    return {name: (currents[name], summed[name]) for name in names}


class _GradientRun:
    """The embeddings of one run as the leaves of its graph, and the gradients that arrive at hook points."""

    def __init__(self, target: Tensor, fraction: float) -> None:
        self.target, self.fraction = target, fraction
        self.leaves: list[Tensor] = []
        self.gradients: dict[str, Tensor] = {}

    def leave_graph(self, tensor: Tensor, hook: HookPoint) -> Tensor:
        """The embedding, part of the way to the other run's, as a leaf."""
        value = tensor.detach()
        if hook.name == "hook_embed" and self.fraction:
            value = torch.lerp(value, self.target, self.fraction)
        leaf = value.clone().requires_grad_()
        self.leaves.append(leaf)
        return leaf

    def keep_gradient(self, gradient: Tensor, hook: HookPoint) -> None:
        """Keep what arrives at a hook point."""
        assert hook.name is not None
        self.gradients[hook.name] = gradient.detach()


def change_of(model: HookedCausalLM, baseline: Baseline, name: str, current: Tensor) -> Tensor:
    """New value minus old at a hook point; 0 where both are the same infinity."""
    entry = baseline.entries[name]
    old = baseline.streams[entry.layer] if entry.stage == "stream" else current
    new = baseline.values[name]
    return torch.where(new == old, torch.zeros_like(new), new - old)


def effect_of(name: str, change: Tensor, gradient: Tensor) -> Tensor:
    """The first-order effect of each entry of an activation, `[pairs pos ...]`; vectors are summed."""
    site = find_site(name)
    assert site is not None
    effect = change * gradient
    return effect.transpose(1, 2) if "key" in site.axes else effect.sum(-1)


def _sum_cell(effect: Tensor, cell: Cell, lengths: Sequence[int]) -> Tensor:
    """The effect of one cell for each pair."""
    sums = []
    for row, length in zip(effect, lengths, strict=True):
        part = row[:length]
        if cell.source is not None:
            part = part[..., cell.source % length]
        if cell.head is not None:
            part = part[:, cell.head]
        sums.append((part if cell.pos is None else part[cell.pos % length]).sum())
    return torch.stack(sums)
