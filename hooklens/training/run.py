"""A training run: step after step, reported, saved, and taken up where it was left."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.errors import CheckpointError, InputError
from hooklens.progress import progress_bar
from hooklens.training.batches import Objective
from hooklens.training.config import TrainConfig
from hooklens.training.data import DataStream, Place, place_from_plain, place_to_plain
from hooklens.training.keeping.folder import FORMAT, RunFolder
from hooklens.training.keeping.interrupts import hold_interrupts
from hooklens.training.keeping.randomness import (
    States,
    capture_random,
    keep_random,
    restore_random,
    states_from_plain,
    states_to_plain,
)
from hooklens.training.metrics import Log, MetricsLog
from hooklens.training.optimizers import make_optimizer, make_schedule
from hooklens.training.result import DivergedError, TrainingInterruptedError, TrainResult


@dataclass(frozen=True)
class Meter:
    """What the next entry of the metrics tells of the steps since the last one.

    Attributes:
        loss_sum: over these steps; it stays on its device until somebody asks.
        n_steps: how many these are.
        learning_rate: of the latest of them.
        grad_norm: the same, before clipping; None: not measured.
        reported: what is due at this step has been written.
    """

    loss_sum: Tensor
    n_steps: int = 0
    learning_rate: float = 0.0
    grad_norm: Tensor | None = None
    reported: bool = True


@dataclass(frozen=True)
class Boundary:
    """What the steps to come depend on, beside weights and optimiser, as it was between two steps."""

    step: int
    random: States
    place: Place
    meter: Meter


class TrainingRun:
    """Training from the first step or from the latest checkpoint on.

    Args:
        model: whose parameters are trained.
        objective: what is made small.
        config: everything else that decides the run.
        stream: the batches.
        eval_data: batches to evaluate on.
        folder: opened; None: nothing is saved.
        log: gets the metrics.
        progress: show a progress bar.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: TrainConfig,
        stream: DataStream,
        *,
        eval_data: Iterable[Any] | None,
        folder: RunFolder | None,
        log: Log | None,
        progress: bool,
    ) -> None:
        self.model, self.config, self.step = model, config, 0
        self._objective, self._stream, self._eval_data = objective, stream, eval_data
        self._folder, self._progress = folder, progress
        self._device = next(one for one in model.parameters() if one.requires_grad).device
        self._optimizer = make_optimizer(model, config)
        self._schedule = make_schedule(self._optimizer, config)
        self._scaler = torch.amp.GradScaler(self._device.type) if config.autocast == "float16" else None
        self._meter = Meter(torch.zeros((), device=self._device))
        self._take_up()
        path = None if folder is None else folder.metrics_path
        self._metrics = MetricsLog(path, log, step=self.step if self._meter.reported else self.step - 1)
        self._boundary: Boundary | None = None
        self._has_buffers = bool(
            model.state_dict().keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
        )
        self._steps_along = False

    def finish(self) -> TrainResult:
        """Make the steps that are left.

        Raises:
            TrainingInterruptedError: Ctrl-C; what was trained is saved where there is a folder.
            DivergedError: the loss is no finite number any more.
        """
        bar = progress_bar("training", total=self.config.steps, initial=self.step, progress=self._progress, stays=True)
        try:
            with bar, hold_interrupts() as interrupts:
                self._optimizer.zero_grad(set_to_none=True)
                self._mark_boundary()
                if self.step == 0:
                    self._save()
                self._report(bar)
                while self.step < self.config.steps and not interrupts.asked:
                    self._make_step()
                    self._mark_boundary()
                    bar.update()
                    self._report(bar)
                    if self._is_due(self.config.checkpoint_every):
                        self._save()
            self._save()
        except (Exception, KeyboardInterrupt) as error:
            # What a forward leaves in buffers belongs to a step that was not made.
            if not (self._has_buffers or isinstance(error, DivergedError | CheckpointError)):
                self._save()
            if isinstance(error, KeyboardInterrupt):
                raise self._tell_interrupted() from error
            raise
        finally:
            self._optimizer.zero_grad(set_to_none=True)
            self._stream.close()
        if self.step < self.config.steps:
            raise self._tell_interrupted()
        return self._make_result()

    def _make_result(self) -> TrainResult:
        return TrainResult(
            model=self.model,
            step=self.step,
            records=tuple(self._metrics.records),
            folder=None if self._folder is None else self._folder.path,
        )

    def _tell_interrupted(self) -> TrainingInterruptedError:
        text = f"training was interrupted after {self.step} of {self.config.steps} steps"
        if self._steps_along:
            text += ", within the next one: its weights are partly changed"
        if self._folder is not None:
            text += f"; the same call goes on from the checkpoint of step {self._folder.steps()[-1]}"
        else:
            text += "; with folder=... the same call would go on from there"
        return TrainingInterruptedError(f"{text}. What was trained is in this error's .result", self._make_result())

    # ---- one step

    def _make_step(self) -> None:
        batches = [self._objective.read(self._stream.read(), self._device) for _ in range(self.config.accumulate)]
        loss = torch.zeros((), device=self._device)
        for batch, share in zip(batches, self._share_out(batches), strict=True):
            with self._autocast():
                part = self._objective.measure(self.model, batch)
            if not part.requires_grad:
                raise InputError("the loss depends on no parameter that requires gradients: it cannot be made smaller")
            part = part if share == 1.0 else part * share
            torch.autograd.backward(part if self._scaler is None else self._scaler.scale(part))
            loss = loss + part.detach()
        grad_norm = self._clip()
        meter = Meter(
            self._meter.loss_sum + loss,
            self._meter.n_steps + 1,
            float(self._schedule.get_last_lr()[0]),
            grad_norm,
            reported=False,
        )
        self._steps_along = True
        if self._apply_gradients():
            self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._meter, self.step = meter, self.step + 1
        self._steps_along = False

    def _share_out(self, batches: list[Any]) -> list[float]:
        """What each batch's mean counts in the mean of all."""
        if len(batches) == 1:
            return [1.0]
        weights = [self._objective.weigh(self.model, batch) for batch in batches]
        if 0 in weights:
            raise InputError(
                f"batches {[i for i, one in enumerate(weights) if not one]} of a step have no token to predict"
            )
        return [weight / sum(weights) for weight in weights]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.config.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, dtype=getattr(torch, self.config.autocast))

    def _clip(self) -> Tensor | None:
        if self.config.max_grad_norm is None:
            return None
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        trained = [one for group in self._optimizer.param_groups for one in group["params"]]
        return torch.nn.utils.clip_grad_norm_(trained, self.config.max_grad_norm).detach()

    def _apply_gradients(self) -> bool:
        """Step the optimiser; whether it did, and did not leave out gradients that overflowed in float16."""
        if self._scaler is None:
            self._optimizer.step()
            return True
        scale = self._scaler.get_scale()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= scale

    # ---- reports

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _report(self, bar: Any) -> None:
        """Write the metrics that are due at this step."""
        if self._meter.reported:
            return
        is_last = self.step == self.config.steps
        metrics: dict[str, float] = {}
        meter = Meter(self._meter.loss_sum, self._meter.n_steps)
        if self._is_due(self.config.log_every) or self._is_due(self.config.checkpoint_every) or is_last:
            self._refuse_diverged()
        if self._is_due(self.config.log_every) or is_last:
            metrics["loss"] = float(self._meter.loss_sum) / self._meter.n_steps
            metrics["learning_rate"] = self._meter.learning_rate
            if self._meter.grad_norm is not None and math.isfinite(norm := float(self._meter.grad_norm)):
                metrics["grad_norm"] = norm
            meter = Meter(torch.zeros((), device=self._device))
            bar.set_postfix(loss=f"{metrics['loss']:.4g}", refresh=False)
        if self._eval_data is not None and (is_last or self._is_due(self.config.eval_every)):
            metrics["eval_loss"] = self._evaluate(self._eval_data)
        if metrics:
            self._metrics.add(self.step, metrics)
        self._meter = meter
        self._mark_boundary()

    def _refuse_diverged(self) -> None:
        if not math.isfinite(float(self._meter.loss_sum)):
            saved = [] if self._folder is None else self._folder.steps()
            before = f"; the checkpoint of step {saved[-1]} is from before" if saved else ""
            raise DivergedError(
                f"the loss is {float(self._meter.loss_sum)} in steps {self.step - self._meter.n_steps + 1} to "
                f"{self.step}{before}. A lower learning_rate, a longer warm-up or a lower max_grad_norm may help"
            )

    def _evaluate(self, data: Iterable[Any]) -> float:
        """The mean loss over data, in evaluation mode; leaves no trace in the training to come."""
        total, weights = 0.0, 0
        # Not around the data: a bar begins what it counts more than once.
        bar = progress_bar("evaluating", unit="batch", progress=self._progress)
        self.model.eval()
        try:
            with bar, torch.no_grad(), keep_random():
                for given in data:
                    batch = self._objective.read(given, self._device)
                    weight = self._objective.weigh(self.model, batch)
                    with self._autocast():
                        total += float(self._objective.measure(self.model, batch)) * weight
                    weights += weight
                    bar.update()
        finally:
            self.model.train()
        if not weights:
            raise InputError("eval_data holds no batch, or none with a token to predict")
        if not math.isfinite(total):
            raise DivergedError(f"the loss on eval_data is {total} after step {self.step}")
        return total / weights

    # ---- checkpoints

    def _mark_boundary(self) -> None:
        """Note what a checkpoint of this moment needs beside weights and optimiser."""
        if self._folder is not None:
            self._boundary = Boundary(self.step, capture_random(), self._stream.place(), self._meter)

    def _save(self) -> None:
        """Write a checkpoint of the latest boundary, unless weights may have moved since."""
        at = self._boundary
        if self._folder is None or at is None or at.step != self.step or self._steps_along:
            return
        self._metrics.force_to_disk()
        grad_norm = at.meter.grad_norm
        training: Mapping[str, Any] = {
            "format": FORMAT,
            "step": at.step,
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "random": states_to_plain(at.random),
            "data": place_to_plain(at.place),
            "meter": {
                **vars(at.meter),
                "loss_sum": at.meter.loss_sum.cpu(),
                "grad_norm": None if grad_norm is None else grad_norm.cpu(),
            },
        }
        self._folder.save(at.step, self.model, training, keep=self.config.keep_checkpoints)

    def _take_up(self) -> None:
        """Go to the latest checkpoint, where there is one."""
        steps = [] if self._folder is None else self._folder.steps()
        if self._folder is None or not steps:
            self._stream.seed(int(torch.randint(2**62, ())))
            return
        if steps[-1] > self.config.steps:
            raise CheckpointError(
                f"{self._folder.path} holds a run of {steps[-1]} steps; steps={self.config.steps} is behind it: choose "
                "another folder, or at least as many steps"
            )
        training = self._folder.load_training(steps[-1])
        weights = self._folder.load_weights(steps[-1])
        with _told_damage(f"{self._folder.path}: the checkpoint of step {steps[-1]}"):
            self.model.load_state_dict(weights)
            self._optimizer.load_state_dict(training["optimizer"])
            self._schedule.load_state_dict(training["schedule"])
            if self._scaler is not None:
                self._scaler.load_state_dict(training["scaler"])
            meter = training["meter"]
            self._meter = Meter(**{**meter, "loss_sum": meter["loss_sum"].to(self._device)})
            place = place_from_plain(training["data"])
            random = states_from_plain(training["random"])
            self.step = training["step"]
        self._stream.go_to(place, progress=self._progress)
        restore_random(random)


@contextlib.contextmanager
def _told_damage(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{what} does not fit: {error}") from error
