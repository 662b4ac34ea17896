"""Fitting the constants of an optimal ablation by gradients, see `constants`."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.arguments import read_flag, read_int, read_number, read_seed, reads, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.patching.circuits.ablation import written_names
from hooklens.patching.circuits.ground import Ground
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.errors import MetricError, SweepInterruptedError
from hooklens.patching.graph.circuit import Circuit
from hooklens.patching.graph.nodes import check_additive, check_heads_apart
from hooklens.patching.learned.constants import OptimalAblation, constants_of, outputs_of
from hooklens.patching.learned.soft_run import SoftRun, pairs_per_step
from hooklens.patching.learned.training import Grounds
from hooklens.patching.metrics.function import MetricFunction, as_metric
from hooklens.patching.metrics.metric import Metric
from hooklens.patching.metrics.of_runs import KL
from hooklens.patching.pairs.loader import Pairs, read_all_pairs
from hooklens.patching.pairs.prompts import Corrupted, PromptPairs
from hooklens.patching.runs.memory import BatchSize
from hooklens.patching.runs.options import RunOptions, refuse_missing
from hooklens.patching.runs.sources import mean_activations
from hooklens.patching.runs.tally import finish_or_keep
from hooklens.precision import wide_dtype
from hooklens.progress import progress_bar

# How often the loss on all pairs is looked at; the best constants seen are kept.
_LOOKS = 10


@reads()
@torch.inference_mode(mode=False)
def fit_optimal_ablation(
    model: HookedCausalLM,
    clean: Pairs,
    corrupted: Corrupted | None = None,
    circuit: Circuit | None = None,
    metric: Metric | MetricFunction | Literal["kl"] = "kl",
    *,
    each_position: bool = False,
    steps: int = 200,
    lr: float = 0.05,
    seed: int = 0,
    batch_size: BatchSize = "auto",
    attention_mask: Int[Tensor, "batch pos"] | None = None,
    progress: bool = True,
    allow_training: bool = False,
) -> OptimalAblation:
    """Fit the constants that edges outside a circuit carry, so that its loss is smallest.

    The fit starts from means over the corrupted prompts. The best constants that it comes by are kept, zeros and those
    means among them, so the loss on the fitting prompts is never above that of either.

    Args:
        model: the model; nothing may be attached to its hook points. Its weights are left as they are.
        clean: prompts whose behaviour is studied; with `corrupted=None` a `Pair`, a list of pairs, or a loader of them.
        corrupted: as many prompts of the same lengths.
        circuit: the edges that are not ablated.
        metric: `"kl"`, the divergence from the whole network's predictions at the last position; or a metric as for
            a sweep, of which the mean square of the difference to the clean run's is minimised.
        each_position: fit a constant for each position, for prompts of one length in which positions mean the same.
        steps: updates.
        lr: the first step of Adam, in units of each writer's root mean square; steps fall to 0 along a line.
        seed: the order of pairs.
        batch_size: pairs run at once, which are the pairs of an update; `"auto"` at most 32, by memory.
        attention_mask: real tokens (1) of padded ids, the same for both.
        progress: show a progress bar.
        allow_training: accept a model in training mode.

    Returns:
        Constants by hook name, for `ablation=`.

    Raises:
        InputError: options that are none, prompts that do not go together or are of different length where positions
            have their own constants, or a norm between heads and stream.
        SiteError: a circuit with edges that the network has not.
        MetricError: the metric is NaN or infinite, or ablating everything does not change it.
        SweepInterruptedError: stopped, or failed on the way; `.result` has the best constants so far.

    Example:
        >>> constants = patching.fit_optimal_ablation(model, pairs, circuit=found)
        >>> patching.evaluate_circuits(model, pairs, circuits=[found], metric=patching.KL(), ablation=constants)
    """
    refuse_missing("fit_optimal_ablation", circuit=circuit)
    options = RunOptions.read(model, batch_size=batch_size, progress=progress, allow_training=allow_training)
    if not isinstance(circuit, Circuit):
        raise InputError(f"fit_optimal_ablation: circuit is {show(circuit)}, expected a patching.Circuit")
    apart = read_flag(each_position, what="fit_optimal_ablation: each_position")
    n_steps = read_int(steps, what="fit_optimal_ablation: steps", least=1)
    rate = read_number(lr, what="fit_optimal_ablation: lr", expected="a number above 0", allows=lambda found: found > 0)
    drawn_by = read_seed(seed, what="fit_optimal_ablation: seed")
    check_additive(model.cfg)
    check_heads_apart(model.cfg)
    circuit.check(model.cfg)
    prompts = read_all_pairs(model, clean, corrupted, attention_mask)
    if prompts.noise is not None:
        raise InputError(
            "fit_optimal_ablation: noise stands in the place of the corrupted prompts, but nothing is resampled here: "
            "constants are put in the place of what circuits leave out; give prompts that differ in words"
        )
    if apart and prompts.is_padded:
        raise InputError(
            f"fit_optimal_ablation: each_position=True needs prompts of one length, in which positions mean the same; "
            f"these have between {min(prompts.lengths)} and {max(prompts.lengths)} tokens"
        )
    match metric:
        case str("kl"):
            measured: Metric = KL()
        case _:
            measured = as_metric(metric)
    with torch.no_grad():
        encoded = measured.encode(model)
        runners = {
            word: CircuitRunner(model, prompts, encoded, ablation=word, batch_size=options.batch_size)
            for word in ("zero", "resample")
        }
    fit = _Fit(runners["zero"], runners["resample"], prompts, circuit, each_position=apart)
    return fit.finish(n_steps, rate, drawn_by, progress=options.progress)


@dataclass
class _Fit:
    """A fit in progress: the best constants so far."""

    runner: CircuitRunner
    resampling: CircuitRunner
    prompts: PromptPairs
    circuit: Circuit
    each_position: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        model = self.runner.model
        self.mask = self.circuit.to_mask(model.cfg)[None]
        self.scale = model.cfg.residual_scale
        self.history: list[float] = []
        self.losses: dict[str, float] = {}
        # The constants and their loss, written in one step, so that what an interrupt leaves goes together.
        self.best: tuple[Tensor, float] | None = None

    def finish(self, steps: int, lr: float, seed: int, *, progress: bool) -> OptimalAblation:
        """Take all steps."""

        def work() -> None:
            with progress_bar("fitting", total=steps, progress=progress) as bar:
                self._fit(steps, lr, seed, lambda: bar.update(1))

        def stopped(why: str, partial: OptimalAblation) -> Exception:
            return SweepInterruptedError(
                f"fitting an ablation stopped after {len(self.history)} of {steps} steps ({why}); the best constants "
                "so far are in this error's .result",
                partial,
            )

        return finish_or_keep(work, self.result, has_begun=lambda: self.best is not None, stopped=stopped)

    def result(self) -> OptimalAblation:
        """The best constants so far."""
        assert self.best is not None
        model = self.runner.model
        return OptimalAblation(
            outputs=outputs_of(self.best[0].to(model.dtype), self.runner.graph.writers, self.scale),
            circuit=self.circuit,
            losses={**self.losses, "optimal": self.best[1]},
            history=torch.tensor(self.history, dtype=torch.float64),
            metric=self.runner.metric.name,
        )

    def _fit(self, steps: int, lr: float, seed: int, done: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        size = len(order) if self.runner.metric.needs_all_pairs else pairs_per_step(self.runner)
        groups = [sorted(order[first : first + size]) for first in range(0, len(order), size)]
        grounds = Grounds(self.runner, groups)
        first, unit = self._first(grounds)
        moved = torch.zeros_like(first).requires_grad_()
        optimiser = torch.optim.Adam([moved], lr=lr)
        looks = {round(steps * (look + 1) / _LOOKS) for look in range(_LOOKS)}
        for step, number in zip(range(1, steps + 1), grounds.order(generator), strict=False):
            ground = grounds[number]
            # Adam's steps do not shrink by themselves, and a start near the minimum would only be left.
            optimiser.param_groups[0]["lr"] = lr * (1 - (step - 1) / steps)
            with torch.enable_grad():
                loss = self._loss(grounds, ground, first + unit * moved)
                (moved.grad,) = torch.autograd.grad(loss, [moved])
            if not bool(loss.isfinite()):
                raise MetricError(f"the loss of step {step} is {float(loss.detach())}; lower lr, which is {lr}")
            optimiser.step()
            self.history.append(float(loss.detach()) * grounds.scale)
            if step in looks:
                self._keep_best(grounds, (first + unit * moved).detach())
            done()

    def _first(self, grounds: Grounds) -> tuple[Tensor, Tensor]:
        """The constants to begin with, and each writer's root mean square; notes the other ablations' losses."""
        model, prompts, graph = self.runner.model, self.prompts, self.runner.graph
        columns = torch.arange(prompts.corrupted.shape[1], device=model.device)
        real = (columns < torch.tensor(prompts.lengths, device=model.device)[:, None]).long()
        means = mean_activations(
            model, prompts.corrupted, written_names(model), each_position=self.each_position, attention_mask=real
        )
        mean = constants_of(means, graph.writers, self.scale).to(wide_dtype(model.dtype))
        zero = torch.zeros_like(mean)
        with torch.no_grad():
            self._note_losses(grounds, zero, mean)
            unit = grounds[0].changes.to(mean).square().mean((1, 2, 3), keepdim=True).sqrt()[:, 0]
        for constants in (zero, mean):
            self._keep_best(grounds, constants)
        # Never from zeros: a norm that reads nothing else has its steepest place there, and the first step is a leap.
        return mean, unit

    def _note_losses(self, grounds: Grounds, zero: Tensor, mean: Tensor) -> None:
        self.losses["zero"], self.losses["mean"] = (self._mean_loss(grounds, constants) for constants in (zero, mean))
        total = 0.0
        for group in self.resampling.groups():
            ground = self.resampling.prepare(group)
            measured = self.resampling.measure(ground, self.mask)[0]
            total += float(grounds.loss(ground, measured)) * grounds.scale * len(group)
        self.losses["resample"] = total / len(self.prompts)

    @torch.no_grad()
    def _keep_best(self, grounds: Grounds, constants: Tensor) -> None:
        # Rounded as they are handed out, so that the loss is the one that they will have.
        rounded = constants.to(self.runner.model.dtype).to(constants)
        found = self._mean_loss(grounds, rounded)
        if self.best is None or found < self.best[1]:
            self.best = rounded, found

    def _mean_loss(self, grounds: Grounds, constants: Tensor) -> float:
        """The loss on all pairs, in the metric's units."""
        total = 0.0
        for number in range(len(grounds)):
            ground = grounds[number]
            total += float(self._loss(grounds, ground, constants)) * grounds.scale * len(ground.pairs)
        return total / len(self.prompts)

    def _loss(self, grounds: Grounds, ground: Ground, constants: Tensor) -> Float[Tensor, ""]:
        shown = constants[:, : ground.width] if self.each_position else constants
        run = SoftRun(self.runner.model, self.runner.wiring, ground, self.mask.to(ground.changes), constants=shown)
        return grounds.loss(ground, ground.metric.measure(run.logits())[0])
