"""Training gates: the loss of soft runs, the price of open gates, and one optimiser for both."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.patching.circuits.ground import Ground
from hooklens.patching.circuits.runner import CircuitRunner
from hooklens.patching.errors import MetricError
from hooklens.patching.learned.gates import open_probability, sample_gates
from hooklens.patching.learned.level import GateLayout
from hooklens.patching.learned.soft_run import SoftRun
from hooklens.patching.metrics.of_runs import KL
from hooklens.precision import widen

# The part of training in which the target falls.
_RAMP = 0.6
# A metric is a sum of so many rounded numbers, or fewer.
_ROUNDINGS = 100


class Grounds:
    """The grounds of groups of pairs, held where memory allows and made anew where it does not.

    Args:
        runner: makes them.
        groups: the pairs of each.

    Attributes:
        scale: the mean loss with everything ablated, in the metric's units.

    Raises:
        MetricError: ablating everything changes nothing, or gives NaN.
    """

    def __init__(self, runner: CircuitRunner, groups: list[list[int]]) -> None:
        self._runner, self._groups = runner, groups
        self._held: dict[int, Ground] = {}
        self._is_divergence = isinstance(runner.metric, KL)
        self.scale = 1.0
        found, rounding = self._mean_ablated_loss()
        if not rounding < found < torch.inf:
            raise MetricError(
                f"metric {runner.metric.name} of the run with every edge ablated differs from the clean run's by a "
                f"mean loss of {found:.3g}; expected a number above what rounding makes ({rounding:.1g}), on whose "
                "scale circuits can be compared. Choose prompts that differ in the metric"
            )
        self.scale = found

    @torch.no_grad()
    def _mean_ablated_loss(self) -> tuple[float, float]:
        """The mean loss with everything ablated, and how much of it may be rounding."""
        total, squares = 0.0, 0.0
        for number, group in enumerate(self._groups):
            ground = self[number]
            measured = self._runner.measure_ablated(ground)
            total += float(self.loss(ground, measured)) * len(group)
            squares += float(widen(measured).square().sum())
        n_pairs = sum(map(len, self._groups))
        relative = _ROUNDINGS * torch.finfo(self._runner.model.dtype).eps
        return total / n_pairs, relative if self._is_divergence else relative**2 * squares / n_pairs

    def __len__(self) -> int:
        return len(self._groups)

    @torch.no_grad()
    def __getitem__(self, number: int) -> Ground:
        if number in self._held:
            return self._held[number]
        ground = self._runner.prepare(self._groups[number])
        if len(self._held) < self._runner.grounds_to_hold(ground, 1):
            self._held[number] = ground
        return ground

    def loss(self, ground: Ground, measured: Float[Tensor, " pair"]) -> Float[Tensor, ""]:
        """How far runs are from the clean ones, 1 being the run with everything ablated.

        A divergence is its own loss; of other metrics it is the mean square of the difference to the clean run's.
        """
        away = widen(measured)
        per_pair = away if self._is_divergence else (away - widen(ground.clean)).square()
        return per_pair.mean() / self.scale

    def order(self, generator: torch.Generator) -> Iterator[int]:
        """Groups without end, in a new order each time around."""
        while True:
            yield from torch.randperm(len(self), generator=generator).tolist()


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How many gates are to stay open, and how training goes.

    Attributes:
        steps: updates.
        lr: the step of Adam, for gates and multipliers alike.
        n_open: the number of open gates that is aimed at; None: a price on each.
        penalty: that price, for all gates together, in units of the loss.
    """

    steps: int
    lr: float
    n_open: int | None
    penalty: float


@dataclass
class GateTraining:
    """Gates in training, and how it has gone.

    Attributes:
        layout: where gates are.
        log_alpha: their parameters, float32.
        losses, sizes, targets: of each step so far.
    """

    layout: GateLayout
    log_alpha: Float[Tensor, " gate"]
    losses: list[float] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)
    targets: list[float] = field(default_factory=list)

    def run(self, runner: CircuitRunner, grounds: Grounds, schedule: Schedule, seed: int) -> Iterator[None]:
        """Take all steps.

        With a target, two multipliers (Wang, Wohlwend and Lei 2020, "Structured Pruning of Large Language Models")
        rise for as long as the expected share of open gates is off its target, which falls from where training
        begins to the wanted one over the first part of the steps:

            loss + first (share - target) + second (share - target)^2

        Raises:
            MetricError: the loss is NaN or infinite.
        """
        generator = torch.Generator().manual_seed(seed)
        gates = self.log_alpha.clone().requires_grad_()
        multipliers = torch.zeros(2, requires_grad=True)
        optimiser = torch.optim.Adam([gates], lr=schedule.lr)
        optimiser.add_param_group({"params": [multipliers], "maximize": True})
        first_share = float(open_probability(gates.detach()).mean())
        for step, number in zip(range(schedule.steps), grounds.order(generator), strict=False):
            target = _target(schedule, step, first_share, len(self.layout))
            with torch.enable_grad():
                ground = grounds[number]
                drawn = self.layout.spread(sample_gates(gates, generator))
                run = SoftRun(runner.model, runner.wiring, ground, drawn[None])
                loss = grounds.loss(ground, ground.metric.measure(run.logits())[0])
                share = open_probability(gates).mean()
                price = schedule.penalty * share
                if target is not None:
                    price = multipliers[0] * (share - target) + multipliers[1] * (share - target).square()
                total = loss.to(price) + price
                trained = [gates] if target is None else [gates, multipliers]
                grads = torch.autograd.grad(total, trained)
            if not bool(total.isfinite()):
                raise MetricError(
                    f"the loss of step {step} is {float(loss.detach())}; lower lr, which is {schedule.lr}, or choose a "
                    "metric that is finite for ablated runs"
                )
            for parameter, grad in zip(trained, grads, strict=True):
                parameter.grad = grad
            optimiser.step()
            runner.forwards += 1
            runner.token_layers += run.token_layers
            # Written behind the update, so that what an interrupt leaves goes together.
            self.log_alpha = gates.detach().clone()
            self.losses.append(float(loss.detach()))
            self.sizes.append(float(share.detach()) * len(self.layout))
            self.targets.append(float("nan") if target is None else target * len(self.layout))
            yield


def _target(schedule: Schedule, step: int, first: float, n_gates: int) -> float | None:
    """The share of open gates that a step is pulled to."""
    if schedule.n_open is None:
        return None
    wanted = schedule.n_open / n_gates
    done = min(1.0, (step + 1) / max(1.0, _RAMP * schedule.steps))
    return first + (wanted - first) * done
