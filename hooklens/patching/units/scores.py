"""Scores of units: what each entry of an activation does for a behaviour.

With `a` a unit's activation on the clean prompt, `a'` its ablated value and `m` the metric,

    score = s * sum over positions of (a - a') . dm/da          method="atp", to first order
    score = s * (m - m with the unit ablated at all positions)  method="exact", one run for each unit

where `s` is 1 where the metric is larger on the clean prompts than on the corrupted ones, and -1 otherwise, so that a
score above 0 says that the unit works for the behaviour (attribution patching, Nanda 2023; of neurons and latents,
Marks et al. 2024, "Sparse Feature Circuits").

`rules` says how the backward pass departs from the gradient: see `hooklens.patching.estimates.rules`. A single unit is
a small step, for which the tangent is right: over the neurons of the bundled models the gradient itself, the default,
is best or within 0.004 of the best (`docs/attribution.md` has a table). `scores.check(k)` runs the strongest units and
some of the others exactly.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_one_of, reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.hooks.splice import Splice
from hooklens.patching.estimates.rules import GRADIENT, ReadRules, Rules, join_dropped, read_rules
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.units.ground import UnitAblation, UnitGround, UnitRunner
from hooklens.patching.units.scored import UnitScores
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
    rules: Rules | None = None,
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
        rules: how gradients are taken: a named set (`"gradient"`, `"norms"`, `"linear"`, `"relp"`, `"gim"`, `"atp*"`),
            or a list of rules; None: `"gradient"`, no rule.
        splices: autoencoders and the like, which act in every run.
        ablation: what is put in the place of a unit's own value: that on the corrupted prompt (`"resample"`), its mean
            over the corrupted prompts (`"mean"`), 0 (`"zero"`), or tensors by hook name.
        batch_size: rows run at once; `"auto"`: some thousand tokens.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: names or an ablation that are none, prompts that do not go together, or rules that are none, do not
            go with the network, or are given with exact scores.
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
    if how == "exact" and rules is not None:
        raise InputError("score_units: method='exact' takes no gradients, so rules= says nothing; leave it out")
    taken = GRADIENT if how == "exact" else read_rules(model, rules, what="score_units", default="gradient")
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    runner = UnitRunner(
        model, prompts, points, as_metric(metric).encode(model), splices=splices, ablation=ablation,
        batch_size=options.batch_size,
    )  # fmt: skip
    return _Scoring(runner, taken).finish(how, progress=options.progress)


def read_names(given: object, what: str) -> list[str]:
    """Hook points, each once.

    Raises:
        InputError: no list of texts, or an empty one.
    """
    listed = [] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if not listed or not all(isinstance(name, str) for name in listed):
        raise InputError(f"{what}: names are {show(given)}; expected a list of hook points' full names")
    return list(dict.fromkeys(listed))


class _Scoring:
    """The scores of units, summed over groups of pairs."""

    def __init__(self, runner: UnitRunner, rules: ReadRules) -> None:
        self.runner, self.rules = runner, rules
        self.side = 0.0
        # By hook name, how many units there are.
        self.widths: dict[str, int] = {}

    def finish(self, method: Literal["atp", "exact"], *, progress: bool) -> UnitScores:
        """Score all units.

        Raises:
            HookLensError: both unpatched runs have the same metric.
        """
        is_exact = method == "exact"
        if is_exact:
            scores = self._sum(lambda ground: self._try(ground, None), "scoring units", progress=progress)
        else:
            scores = self._sum(self._estimate, "scoring units", progress=progress)
        if self.side == 0:
            raise HookLensError(
                f"score_units: the clean and the corrupted run have the same {self.runner.metric.name}; no unit can "
                "work for or against what tells them apart"
            )
        parts = torch.split(scores.to(self.runner.model.dtype), list(self.widths.values()))
        return UnitScores(
            scores=dict(zip(self.widths, parts, strict=True)),
            metric=self.runner.metric.name,
            method=method,
            rules=self.rules.name,
            ablation=self.runner.ablation_name,
            run_exactly=None if is_exact else self.run_exactly,
        )

    def run_exactly(self, chosen: Sequence[int], *, progress: bool) -> Float[Tensor, " run"]:
        """The exact scores of some units, counted over all hook points."""
        with torch.inference_mode(mode=False):
            return self._sum(lambda ground: self._try(ground, chosen), "checking units", progress=progress)

    def _sum(
        self, score: Callable[[UnitGround], Float[Tensor, " unit"]], what: str, *, progress: bool
    ) -> Float[Tensor, " unit"]:
        """Scores averaged over pairs, with the sign of what tells the unpatched runs apart."""
        total: Tensor | None = None
        side, n_pairs = 0.0, len(self.runner.prompts)
        with progress_bar(what, total=n_pairs, unit="pair", progress=progress) as bar:
            for pairs in self.runner.groups():
                ground = self.runner.prepare(pairs)
                self.widths = {name: own.shape[-1] for name, own in ground.own.items()}
                side += float((ground.clean - ground.corrupted).double().sum())
                part = score(ground)
                total = part if total is None else total + part
                bar.update(len(pairs))
        self.side = side
        assert total is not None
        return total * ((1.0 if side > 0 else -1.0) / n_pairs)

    def _estimate(self, ground: UnitGround) -> Float[Tensor, " unit"]:
        """To first order, summed over pairs."""
        found = []
        for dropped in ([], *self.rules.drops(self.runner.model)):
            gradients = self.runner.gradients(ground, self.rules, dropped)
            of_names = [
                ((ground.own[name] - ground.ablated[name]) * gradients[name]).double().sum(1)
                for name in self.runner.names
            ]
            found.append(torch.cat(of_names, 1).T)
        return join_dropped(found).sum(1)

    @torch.no_grad()
    def _try(self, ground: UnitGround, chosen: Sequence[int] | None) -> Float[Tensor, " unit"]:
        """One run for each unit (None: for all), summed over pairs."""
        n_units = sum(self.widths.values())
        units = torch.arange(n_units) if chosen is None else torch.tensor(chosen, dtype=torch.long)
        found = []
        for some in torch.split(units, self.runner.circuits_per_pass(ground)):
            kept = torch.ones(len(some), n_units, dtype=torch.bool)
            kept[torch.arange(len(some)), some] = False
            masks = dict(zip(self.widths, torch.split(kept, list(self.widths.values()), 1), strict=True))
            found.append((ground.clean - self.runner.measure(ground, masks)).double().sum(1))
        return torch.cat(found)
