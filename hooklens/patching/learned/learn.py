"""Learned circuits: a gate on every edge or node, trained so that few stay open and the behaviour stays.

A gate multiplies what an edge carries, and what it leaves is filled with what the edge carries when ablated
(`soft_run`). Gates are hard concrete (`gates`), so that a closed one is exactly 0, and the number of open ones has a
gradient. The model's weights are not trained. Two published methods differ in how gates are held closed:

- edge pruning (Bhaskar et al. 2024, "Finding Transformer Circuits with Edge Pruning"): `target_size` or
  `target_sparsity`; a Lagrangian pulls the expected number of open gates to the target.
- subnetwork probing (Cao et al. 2021, "Low-Complexity Probing via Finding Subnetworks"; at the level of nodes and
  edges as in Conmy et al. 2023): `penalty`, a fixed price on open gates.

The loss is the divergence from the whole network's predictions (`KL()`, as in edge pruning), or for another metric the
mean square of its difference to the clean run's: faithful is what does what the network does, not what does more.
Afterwards gates are rounded, and the circuit is measured as `evaluate_circuits` does, on pairs that were trained on and
on others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.arguments import read_int, read_number, read_one_of, read_seed, reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching.circuits.ablation import Ablation
from hooklens.patching.circuits.held_out import draw_held_out, read_holdout
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.errors import SweepInterruptedError
from hooklens.patching.graph.nodes import check_additive, check_heads_apart
from hooklens.patching.learned.gates import log_alpha_of, open_probability
from hooklens.patching.learned.level import GateLayout, Level
from hooklens.patching.learned.result import LearnedCircuit
from hooklens.patching.learned.soft_run import pairs_per_step
from hooklens.patching.learned.training import GateTraining, Grounds, Schedule
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.metrics.of_runs import KL
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted, PromptPairs
from hooklens.patching.results.edge_scores import EdgeScores
from hooklens.patching.results.result import SweepStats
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions
from hooklens.patching.runs.tally import finish_or_keep
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

# Gates begin nearly all open; with scores to begin with, as far apart as training moves them in some dozens of steps.
_FIRST_PROBABILITY = 0.95
_WARM_SPREAD = 2.0


@reads()
@torch.inference_mode(mode=False)
def learn_circuit(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    metric: Metric | MetricFunction | Literal["kl"] = "kl",
    *,
    target_size: int | None = None,
    target_sparsity: float | None = None,
    penalty: float | None = None,
    level: Level = "edge",
    ablation: Ablation = "resample",
    steps: int = 300,
    lr: float = 0.1,
    warm_start: EdgeScores | LearnedCircuit | None = None,
    holdout: float = 0.25,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> LearnedCircuit:
    """Train gates on all edges, or on all heads and MLPs, so that few stay open and the behaviour stays.

    Args:
        model: the model; nothing may be attached to its hook points. Its weights are left as they are.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths for closed edges to take outputs from; or `patching.Noise`.
        metric: `"kl"`, the divergence from the whole network's predictions at the last position; or a metric as for
            a sweep, which must be differentiable.
        target_size: how many edges (or nodes) are to stay.
        target_sparsity: the share of them that is to go, in place of `target_size`.
        penalty: the price of all gates together, in place of a target: 1 is what ablating everything costs.
        level: what gets a gate: each `"edge"`; or each `"node"`, a head or MLP with all edges that lead away from it.
        ablation: what closed edges carry, as for `evaluate_circuits`.
        steps: updates.
        lr: the step of Adam.
        warm_start: scores by which gates begin more or less open, in the order of their size; or a learned circuit to
            go on from, of the same level.
        holdout: the share of pairs that is not trained on, drawn at random.
        seed: what is drawn: gates, held-out pairs, the order of pairs.
        batch_size: pairs run at once, which are the pairs of an update; `"auto"` at most 32, by memory.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Returns:
        The gates, the circuit of the wanted size, and how faithful it is on trained and held-out pairs.

    Raises:
        InputError: none or several of `target_size`, `target_sparsity` and `penalty`; a size, share, price or level
            that is none; a holdout that leaves no pairs, or of a metric that sees all pairs at once; prompts that do
            not go together, scores of another network, or a norm between heads and stream.
        SiteError: an ablation of another shape.
        MetricError: the metric is NaN or infinite, or ablating everything does not change it.
        SweepInterruptedError: stopped, or failed on the way; `.result` is the `LearnedCircuit` so far, which
            `warm_start` takes.

    Example:
        >>> found = patching.learn_circuit(model, pairs, target_size=60, ablation="resample")
        >>> found.held_out.faithfulness_hanna, found.circuit()
        >>> patching.faithfulness_curve(model, others, scores=found.scores, metric=patching.LogitDiff()).plot()
    """
    options = RunOptions.read(model, batch_size=batch_size, progress=progress, allow_training=allow_training)
    read_one_of(level, what="learn_circuit: level", options=get_args(Level))
    n_steps = read_int(steps, what="learn_circuit: steps", least=1)
    rate = _read_above_zero(lr, "lr")
    drawn_by = read_seed(seed, what="learn_circuit: seed")
    share = read_holdout(holdout, what="learn_circuit")
    check_additive(model.cfg)
    check_heads_apart(model.cfg)
    match metric:
        case str("kl"):
            measured: Metric = KL()
        case _:
            measured = as_metric(metric)
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    with torch.no_grad():
        encoded = measured.encode(model)
        runner = CircuitRunner(model, prompts, encoded, ablation=ablation, batch_size=options.batch_size)
    layout = GateLayout.of(runner.graph, level)
    schedule = _read_target(target_size, target_sparsity, penalty, len(layout), n_steps, rate)
    first = _first_log_alpha(runner, layout, warm_start)
    held_out = draw_held_out(prompts, measured, share, drawn_by, what="learn_circuit")
    learning = _Learning(runner, prompts, GateTraining(layout, first), schedule, held_out, drawn_by)
    return learning.finish(progress=options.progress)


@dataclass
class _Learning:
    """Learning in progress: the gates so far, and the values of their circuit once they are trained."""

    runner: CircuitRunner
    prompts: PromptPairs
    training: GateTraining
    schedule: Schedule
    held_out: Tensor
    seed: int

    def __post_init__(self) -> None:
        model = self.runner.model
        self.values = torch.full((3, len(self.prompts)), torch.nan, dtype=wide_dtype(model.dtype), device=model.device)

    def finish(self, *, progress: bool) -> LearnedCircuit:
        """Train, and measure the circuit."""

        def work() -> None:
            with progress_bar("learning", total=self.schedule.steps, progress=progress) as bar:
                for _ in self._train():
                    bar.update(1)
            self._measure()

        def stopped(why: str, partial: LearnedCircuit) -> Exception:
            n_steps = f"{len(self.training.history)} of {self.schedule.steps} steps"
            return SweepInterruptedError(
                f"learning a circuit stopped after {n_steps} ({why}); the gates so far are in .result, and "
                "warm_start= goes on from them",
                partial,
            )

        return finish_or_keep(work, self.result, has_begun=lambda: bool(self.training.history), stopped=stopped)

    def _train(self) -> Iterator[None]:
        order = torch.randperm(len(self.prompts), generator=torch.Generator().manual_seed(self.seed)).tolist()
        pairs = [pair for pair in order if not bool(self.held_out[pair])]
        size = len(pairs) if self.runner.metric.needs_all_pairs else pairs_per_step(self.runner)
        groups = [sorted(pairs[first : first + size]) for first in range(0, len(pairs), size)]
        return self.training.run(self.runner, Grounds(self.runner, groups), self.schedule, self.seed)

    @torch.no_grad()
    def _measure(self) -> None:
        """The values of the rounded circuit, as `evaluate_circuits` gives them."""
        mask = self.result().circuit().to_mask(self.runner.model.cfg)[None]
        values = self.values.clone()
        for group in self.runner.groups():
            ground = self.runner.prepare(group)
            found = [self.runner.measure(ground, mask)[0], ground.clean, self.runner.measure_ablated(ground)]
            values[:, group] = torch.stack(found).to(values)
        self.values = values

    def result(self) -> LearnedCircuit:
        """The gates so far."""
        training, runner, schedule = self.training, self.runner, self.schedule
        likely = int((open_probability(training.log_alpha) > 0.5).sum())
        table = training.layout.spread(training.log_alpha, closed=-torch.inf, fixed=torch.inf)
        history = torch.tensor(training.history, dtype=torch.float64).view(-1, 3)
        n_steps, n_pairs = len(history), len(self.prompts)
        stats = SweepStats(
            cells=n_steps,
            pairs=n_pairs,
            unchanged=0,
            forwards=runner.forwards,
            tokens=runner.token_layers / runner.model.cfg.n_layers,
            naive_forwards=(n_steps + 2) * n_pairs,
            naive_tokens=(n_steps + 2) * sum(self.prompts.lengths),
        )
        return LearnedCircuit(
            log_alpha=table,
            writers=tuple(map(str, runner.graph.writers)),
            readers=tuple(map(str, runner.graph.readers)),
            level=training.layout.level,
            size=likely if schedule.n_open is None else schedule.n_open,
            losses=history[:, 0].contiguous(),
            sizes=history[:, 1].contiguous(),
            targets=history[:, 2].contiguous(),
            held_out_pairs=self.held_out,
            values=self.values.cpu(),
            metric=runner.metric.name,
            ablation=runner.ablation_name,
            method="penalty" if schedule.n_open is None else "lagrangian",
            stats=stats,
        )


def _read_target(size: object, sparsity: object, penalty: object, n_gates: int, steps: int, lr: float) -> Schedule:
    """How training goes, from exactly one of three ways to say how many gates stay open."""
    given = {"target_size": size, "target_sparsity": sparsity, "penalty": penalty}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise InputError(
            f"learn_circuit: {' and '.join(chosen) or 'none of target_size, target_sparsity and penalty'} given; "
            "expected exactly one: target_size=60 edges, target_sparsity=0.95 of all edges, or penalty=1.0 on open "
            "gates"
        )
    if penalty is not None:
        return Schedule(steps=steps, lr=lr, n_open=None, penalty=_read_above_zero(penalty, "penalty"))
    if size is not None:
        wanted = read_int(size, what="learn_circuit: target_size", least=1, most=n_gates)
    else:
        expected = "a share from 0 to below 1 of gates to close"
        what = "learn_circuit: target_sparsity"
        share = read_number(sparsity, what=what, expected=expected, allows=lambda found: 0 <= found < 1)
        wanted = max(1, round((1 - share) * n_gates))
    return Schedule(steps=steps, lr=lr, n_open=wanted, penalty=0.0)


def _read_above_zero(given: object, name: str) -> float:
    return read_number(
        given, what=f"learn_circuit: {name}", expected="a number above 0", allows=lambda found: found > 0
    )


def _first_log_alpha(runner: CircuitRunner, layout: GateLayout, warm_start: object) -> Tensor:
    """The gates' parameters before the first step.

    Raises:
        InputError: scores of another network, or gates of another level.
    """
    open_wide = log_alpha_of(torch.full((len(layout),), _FIRST_PROBABILITY))
    if warm_start is None:
        return open_wide
    if not isinstance(warm_start, EdgeScores | LearnedCircuit):
        raise InputError(
            f"learn_circuit: warm_start is {show(warm_start)}; expected EdgeScores, a LearnedCircuit, or None"
        )
    nodes = tuple(map(str, runner.graph.writers)), tuple(map(str, runner.graph.readers))
    if (warm_start.writers, warm_start.readers) != nodes:
        raise InputError(
            f"learn_circuit: warm_start has {len(warm_start.writers)} writers and {len(warm_start.readers)} readers "
            f"that are not this network's {len(nodes[0])} and {len(nodes[1])}; give scores of this model"
        )
    if isinstance(warm_start, LearnedCircuit):
        if warm_start.level != layout.level:
            raise InputError(
                f"learn_circuit: warm_start has a gate on each {warm_start.level}, and level is {layout.level!r}; go "
                f"on with level={warm_start.level!r}, or begin from warm_start.scores"
            )
        return layout.gather(warm_start.log_alpha).clone()
    strength = layout.gather(warm_start.scores.T.abs().nan_to_num(0.0)).cpu()
    rank = strength.argsort(stable=True).argsort().float()
    return open_wide + _WARM_SPREAD * (2 * rank / max(1, len(layout) - 1) - 1)
