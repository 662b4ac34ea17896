"""Edge attribution patching: what every edge between two nodes would do.

An edge patch moves what a reader gets from one writer, and from it alone, to its value in the other run; all else
that the reader gets stays. To first order, with `o` the writer's output, `x` the reader's input and `m` the metric,

    score(writer, reader) = sum over positions of (o' - o) . dm/dx

With `direction="noise"`, as published, `o` and `dm/dx` are those of the clean run and `o'` is the corrupted one's, so a
positive score says that the metric rises when the edge is taken from the clean run. Methods differ in the runs whose
gradients are averaged:

- `"eap"` (Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit Discovery"): the run that is patched.
- `"eap-ig-inputs"` (Hanna et al. 2024, "Have Faith in Faithfulness"): runs whose input embeddings lie between those of
  the two prompts, at `corrupted + k / steps (clean - corrupted)` for `k = 1 .. steps`; `"eap-ig"` is another name
  for it.
- `"eap-ig-activations"` (the same authors' code): the run that is patched, with one output at a time (the embeddings, a
  layer's attention, a layer's MLP) moved to such points between both runs; the mean over all outputs and points.
- `"clean-corrupted"` (Hanna et al.): both unpatched runs.
- `"exact"`: no gradient, one run of the network for each edge: `m` with this edge alone patched, minus `m`.

`rules` says how backward passes depart from the gradient: see `hooklens.patching.estimates.rules`. The default of
`"eap"` and `"clean-corrupted"` is `"norms"`, which holds the denominators of norms, at no further cost; the published
scores are those of `"gradient"`. On the bundled models it takes the correlation of `"eap"` with exact scores from
between 0.88 and 0.93 to between 0.93 and 0.995.
`result.check(k)` patches the strongest edges and a sample of the others one by one, and compares.

`rule` chooses the points: `"right"` is the published one; `"left"`, `k = 0 .. steps - 1`, is that of the authors'
later code; `"midpoint"`, `k - 1/2`, is ours: its error falls with the square of the steps.

Scores are filled in group by group of pairs. They take memory once, see `EdgeScores`; with `keep_pairs=False` only
sums over pairs are kept, and memory does not grow with their number.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_flag, read_int, read_one_of, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.edits import Edit
from hooklens.patching.circuits.ground import Ground
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.estimates.edge_estimate import EdgeAttributionResult
from hooklens.patching.estimates.edge_gradients import EdgeGradients
from hooklens.patching.estimates.exact_softmax import refuse_exact_softmax
from hooklens.patching.estimates.gradients import Move, Rule, fractions_of
from hooklens.patching.estimates.rules import GRADIENT, ReadRules, Rules, RuleSet, read_rules
from hooklens.patching.graph.nodes import Graph, check_additive
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted, PromptPairs
from hooklens.patching.results.moments import Moments
from hooklens.patching.runs.baseline import Direction
from hooklens.patching.runs.edits import check_node_edits
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.tally import SumTally, Tally
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

Method = Literal["eap", "eap-ig", "eap-ig-inputs", "eap-ig-activations", "clean-corrupted", "exact"]


@reads()
@torch.inference_mode(mode=False)
def edge_attribution(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    metric: Metric | MetricFunction | None = None,
    *,
    method: Method = "eap",
    steps: int = 5,
    rule: Rule = "right",
    rules: Rules | None = None,
    direction: Direction = "noise",
    keep_pairs: bool = True,
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    edits: Sequence[Edit] = (),
    progress: bool = True,
    allow_training: bool = False,
) -> EdgeAttributionResult:
    """Score every edge between embeddings, heads, MLPs and logits.

    Args:
        model: the model.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths; or `patching.Noise` on embeddings of the clean ones.
        metric: as for a sweep; it must be differentiable for all methods but `"exact"`.
        method: how edges are scored, see the module.
        steps: points between the two runs, for `"eap-ig-inputs"` and `"eap-ig-activations"`.
        rule: which points.
        rules: how gradients are taken: a named set (`"gradient"`, `"norms"`, `"linear"`, `"relp"`, `"gim"`, `"atp*"`),
            or a list of rules; None: `"norms"` with `"eap"` and `"clean-corrupted"`, else `"gradient"`.
        direction: `"noise"` takes corrupted outputs into the clean run, as published; `"denoise"` the other way.
        keep_pairs: keep the scores of each pair, from which `EdgeScores` tells intervals and p-values. False: only
            their sums, which are enough for means and standard errors.
        batch_size: pairs run at once (for `"exact"` pairs times edges); `"auto"` by memory.
        attention_mask: real tokens (1) of padded ids, the same for both.
        edits: values from `hooklens.edits` that act in every run, as for `evaluate_circuits`. Not with the exact
            softmax (`"atp*"`).
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Raises:
        InputError: an unknown method or rule, rules with exact scores or that do not go with the network, prompts that
            do not go together, or a norm between heads and stream.
        EditError: an edit that does not fit the model or the prompts, or stands between nodes.
        MetricError: the metric is NaN or infinite for an unpatched run.
        SweepInterruptedError: it was stopped on the way; `.result` holds the scores of the pairs that were done.
    """
    refuse_missing("edge_attribution", metric=metric)
    assert metric is not None
    options = RunOptions.read(
        model, batch_size=batch_size, direction=direction, progress=progress, allow_training=allow_training, edits=edits
    )
    check_additive(model.cfg)
    read_one_of(method, what="edge_attribution: method", options=get_args(Method))
    read_one_of(rule, what="edge_attribution: rule", options=get_args(Rule))
    read_int(steps, what="edge_attribution: steps", least=1)
    keeps = read_flag(keep_pairs, what="edge_attribution: keep_pairs")
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    check_node_edits(options.edits, prompts)
    if method == "exact" and direction != "noise":
        raise InputError(
            "edge_attribution: exact scores are those of the clean run with one corrupted edge; exchange the prompts "
            "to patch the other run"
        )
    default: RuleSet = "norms" if method in ("eap", "clean-corrupted") else "gradient"
    taken = read_rules(model, rules, what="edge_attribution", default=default)
    refuse_exact_softmax(taken, options.edits, what="edge_attribution")
    if method == "exact" and taken.rules:
        raise InputError(f"edge_attribution: method='exact' takes no gradients, so rules={taken.name} says nothing")
    run = _EdgeRun(model, prompts, as_metric(metric).encode(model), method, taken, options, keep_pairs=keeps)
    if method == "exact":
        return run.finish(run.patch_edges(options.batch_size), progress=options.progress)
    moves = list_moves(model, method, steps, rule=rule, direction=direction)
    return run.finish(run.estimate_edges(moves, options.batch_size), progress=options.progress)


def list_moves(model: HookedCausalLM, method: Method, steps: int, *, rule: Rule, direction: Direction) -> list[Move]:
    """The runs whose gradients a method averages."""
    if method == "eap":
        return [Move()]
    if method == "clean-corrupted":
        return [Move(), Move(fraction=1.0)]
    places = ["hook_embed"]
    if method == "eap-ig-activations":
        graph = Graph.of(model.cfg)
        written = dict.fromkeys((writer.layer, writer.kind) for writer in graph.writers if writer.kind != "embed")
        words = {"head": "attn_out", "mlp": "mlp_out"}
        places += [f"blocks.{layer}.hook_{words[kind]}" for layer, kind in written]
    fractions = fractions_of(rule, steps, direction=direction)
    return [Move(place, fraction) for place in places for fraction in fractions]


class _EdgeRun:
    """The scores of all edges, filled in group by group of pairs."""

    def __init__(
        self,
        model: HookedCausalLM,
        prompts: PromptPairs,
        metric: Metric,
        method: Method,
        rules: ReadRules,
        options: RunOptions,
        *,
        keep_pairs: bool,
    ) -> None:
        self.model, self.prompts, self.metric, self.method = model, prompts, metric, method
        self.rules, self.options = rules, options
        self.direction: Direction = options.direction
        self.graph = Graph.of(model.cfg)
        self.exists = self.graph.exists().T.to(model.device)
        self.tally = (Tally if keep_pairs else SumTally)(
            self.exists.numel(),
            len(prompts),
            dtype=wide_dtype(model.dtype),
            device=model.device,
            absent=~self.exists.flatten(),
        )
        self.forwards, self.tokens = 0, 0.0

    def finish(self, steps: Iterator[int], *, progress: bool, n_values: int | None = None) -> EdgeAttributionResult:
        """Take all steps; each says how many scores it has added, of `n_values` (None: those of all edges)."""
        total = self.tally.n_values if n_values is None else n_values

        def work() -> None:
            with progress_bar("scoring", total=total, unit="value", progress=progress) as bar:
                for done in steps:
                    bar.update(done)

        return self.tally.finish("edge attribution", work, self.result)

    def result(self) -> EdgeAttributionResult:
        """The scores so far."""
        clean, corrupted = self.tally.ends()
        sums = self.tally.moments if isinstance(self.tally, SumTally) else None
        return EdgeAttributionResult(
            per_pair=self.tally.per_pair().view(*self.exists.shape, -1) if sums is None else None,
            moments=None if sums is None else Moments(sums.table.view(3, *self.exists.shape)),
            writers=tuple(map(str, self.graph.writers)),
            readers=tuple(map(str, self.graph.readers)),
            exists=self.exists,
            clean_per_pair=clean,
            corrupted_per_pair=corrupted,
            metric=self.metric.name,
            method=self.method,
            direction=self.direction,
            forwards=self.forwards,
            tokens=self.tokens,
            rules=self.rules.name,
            run_exactly=None if self.method == "exact" else self._run_exactly,
        )

    def _run_exactly(self, chosen: Sequence[int], *, progress: bool) -> Float[Tensor, " run"]:
        """The exact scores of some edges, counted in the order of writers and then of readers."""
        run = _EdgeRun(self.model, self.prompts, self.metric, "exact", GRADIENT, self.options, keep_pairs=False)
        writer, reader = self.exists.nonzero()[list(chosen)].T
        edges = torch.stack([reader, writer], dim=1).cpu()
        # Edges into late layers enter there, so neighbours in the order of reading run together.
        steps = run.patch_edges(self.options.batch_size, edges[edges[:, 0].argsort(stable=True)])
        found = run.finish(steps, progress=progress, n_values=len(chosen) * len(self.prompts))
        return found.scores[writer, reader]

    def estimate_edges(self, moves: list[Move], batch_size: BatchSize) -> Iterator[int]:
        """Score from gradients."""
        estimate = EdgeGradients(
            self.model,
            self.prompts,
            self.metric,
            moves,
            direction=self.direction,
            rules=self.rules,
            edits=self.options.edits,
        )
        for group in estimate.groups(batch_size):
            baseline, scores = estimate.run(group)
            self.tally.begin(baseline.clean, baseline.corrupted, baseline.lengths)
            self.tally.store(slice(None), scores.masked_fill_(~self.exists[..., None], 0.0).flatten(0, 1))
            self.forwards, self.tokens = estimate.forwards, estimate.tokens
            yield int(self.exists.sum()) * len(group)

    def patch_edges(self, batch_size: BatchSize, edges: Int[Tensor, "edge two"] | None = None) -> Iterator[int]:
        """Run the clean prompts once for each edge, reader and writer, with this edge alone corrupted; None: all."""
        with torch.no_grad():
            runner = CircuitRunner(
                self.model,
                self.prompts,
                self.metric,
                ablation="resample",
                batch_size=batch_size,
                edits=self.options.edits,
            )
        edges = self.graph.exists().nonzero() if edges is None else edges
        for group in runner.groups():
            with torch.no_grad():
                ground = runner.prepare(group)
            self.tally.begin(ground.clean, ground.corrupted, ground.lengths)
            # Edges into late layers enter there, so neighbours in the order of reading run together.
            for some in torch.split(edges, runner.rows_per_batch(ground)):
                reader, writer = some.T
                effects = self._patch(runner, ground, reader, writer)
                self.tally.store((writer * self.exists.shape[1] + reader).tolist(), effects)
                self.forwards, self.tokens = runner.forwards, runner.token_layers / self.model.cfg.n_layers
                yield effects.numel()

    @torch.no_grad()
    def _patch(
        self, runner: CircuitRunner, ground: Ground, reader: Tensor, writer: Tensor
    ) -> Float[Tensor, "edge pair"]:
        """What the metric changes by as one edge of each run is corrupted."""
        masks = self.graph.exists().repeat(len(reader), 1, 1)
        masks[torch.arange(len(reader)), reader, writer] = False
        return runner.measure(ground, masks) - ground.clean
