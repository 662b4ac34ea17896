"""Edges scored on some prompts, circuits measured on others.

Circuits that are tried on the prompts that they were found on look more faithful than they are, since scores follow
those prompts' noise, too. MIB (Mueller et al. 2025) scores on one split and measures on another; this does so for one
list of pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import optional, read_seed, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.display import Displayed, Summary, format_numbers
from hooklens.patching.choices.choice import EdgeChoice
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.curve import FaithfulnessCurve, faithfulness_curve
from hooklens.patching.estimates.edges import Method, edge_attribution
from hooklens.patching.estimates.gradients import Rule
from hooklens.patching.estimates.rules import Rules
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted
from hooklens.patching.results.edge_scores import EdgeScores
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import refuse_missing
from hooklens.patching.studies.split import draw_rows, read_share, take_metric
from hooklens.viz.charts import Backend


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class HeldOutCurve(Displayed):
    """Scores of edges, and the curve of the circuits that they choose.

    Attributes:
        scores: of the pairs of discovery.
        curve: of the pairs of evaluation.
        discovery_rows, evaluation_rows: which of the given pairs these are; the same where they were not parted.
    """

    scores: EdgeScores
    curve: FaithfulnessCurve
    discovery_rows: tuple[int, ...]
    evaluation_rows: tuple[int, ...]

    def _summary(self) -> Summary:
        parted = "other" if set(self.discovery_rows).isdisjoint(self.evaluation_rows) else "the same"
        of_curve = self.curve._summary()
        return replace(
            of_curve,
            title=(
                f"HeldOutCurve({self.scores.method} on {len(self.discovery_rows)} pairs, {len(self.curve.circuits)} "
                f"circuits on {len(self.evaluation_rows)} {parted} pairs, {self.curve.result.metric})"
            ),
            facts={
                "edges scored on": f"pairs {format_numbers(self.discovery_rows)}",
                "circuits run on": f"pairs {format_numbers(self.evaluation_rows)}",
                **of_curve.facts,
            },
        )

    def plot(self, *, backend: Backend = "plotly", title: str | None = None) -> Any:
        """The curve, as `FaithfulnessCurve.plot` draws it.

        Raises:
            HookLensError, MissingDependencyError: as there.
        """
        return self.curve.plot(backend=backend, title=title)


@reads()
def held_out_curve(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    split: float | None = 0.5,
    seed: int = 0,
    method: Method = "eap-ig-inputs",
    steps: int = 5,
    rule: Rule = "right",
    rules: Rules | None = None,
    sizes: Sequence[int] | Literal["mib"] | None = None,
    choice: EdgeChoice | None = None,
    random_draws: int = 3,
    ablation: Ablation = "resample",
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> HeldOutCurve:
    """Score edges on some of the pairs, and measure the circuits that this chooses on the others.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        metric: as for a sweep, differentiable but for `method="exact"`. Answers that it holds for each pair go with
            the pairs.
        split: the share of pairs that edges are scored on, drawn at random; circuits are measured on all others. None:
            both on all pairs, so that the curve is of prompts that the scores have seen.
        seed: draws the pairs, and the random circuits.
        method, steps, rule, rules: how edges are scored, as for `edge_attribution`.
        sizes, choice, random_draws, ablation: as for `faithfulness_curve`.
        batch_size, attention_mask, progress, allow_training: as for both.

    Raises:
        InputError: a split that is none, or fewer than two pairs to part.
        HookLensError: as `edge_attribution` and `faithfulness_curve`.
    """
    refuse_missing("held_out_curve", metric=metric)
    assert metric is not None
    share = optional(read_share)(split, what="held_out_curve: split")
    number = read_seed(seed, what="held_out_curve: seed")
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    encoded, n_pairs = as_metric(metric).encode(model), len(prompts)
    found_on = tried_on = list(range(n_pairs))
    if share is not None:
        apart = prompts.apart
        drawn = draw_rows(len(apart), share, torch.Generator().manual_seed(number))
        found_on = [pair for place in drawn for pair in apart[place]]
        tried_on = [row for row in range(n_pairs) if row not in set(found_on)]
    options: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "allow_training": allow_training}
    scores = edge_attribution(
        model,
        prompts.take(found_on),
        metric=take_metric(encoded, found_on, n_pairs),
        method=method,
        steps=steps,
        rule=rule,
        rules=rules,
        **options,
    )
    curve = faithfulness_curve(
        model,
        prompts.take(tried_on),
        scores=scores,
        metric=take_metric(encoded, tried_on, n_pairs),
        sizes=sizes,
        choice=choice,
        random_draws=random_draws,
        seed=number,
        ablation=ablation,
        **options,
    )
    return HeldOutCurve(scores=scores, curve=curve, discovery_rows=tuple(found_on), evaluation_rows=tuple(tried_on))
