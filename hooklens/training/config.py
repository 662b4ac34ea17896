"""What decides a training run, beside the model and the data: `TrainConfig`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from hooklens.arguments import Reader, optional, read_int, read_number, read_one_of, read_seed, read_text, refusal
from hooklens.config.checks import refuse
from hooklens.errors import ConfigError, HookLensError, suggest_names
from hooklens.training.optimizers import Schedule, optimizer_problems

Decay = Literal["all", "matrices"]
Autocast = Literal["bfloat16", "float16"] | None
Option = str | int | float | bool | None | tuple[float, ...]
Options = tuple[tuple[str, Option], ...]

_OWNER = "train config"
# A schedule that does not know how long the run is goes on as it was when the run is made longer.
_OPEN_ENDED = ("constant", "inverse_sqrt")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training run, beside the model and the data.

    Attributes:
        steps: optimiser steps.
        optimizer: the name of an optimiser of `torch.optim`.
        learning_rate: at the top of the schedule.
        weight_decay: None: the optimiser's own default.
        decay: which parameters decay: `"all"`, or `"matrices"`: neither biases, nor norms, nor embeddings.
        optimizer_options: further options of the optimiser by name (`{"betas": (0.9, 0.95)}`; `{"fused": True}` is
            faster where the optimiser has it); kept as pairs.
        schedule: `"constant"`; `"linear"` and `"cosine"`, to 0 at the last step; `"inverse_sqrt"`, after the warm-up
            with `1 / sqrt(step / warmup_steps)`. They are those of `transformers.optimization`.
        warmup_steps: steps over which the rate climbs from 0, in which it is at the first of them.
        max_grad_norm: gradients are scaled down to this norm. None: they are left as they are.
        accumulate: batches whose gradients make one step. Of the model's own loss every predicted token counts alike,
            as in one large batch; of a loss of somebody's own every batch does.
        autocast: compute in this dtype where that is safe (`torch.autocast`), weights staying in theirs; float16 with
            a scaled loss. None: in the weights' dtype.
        seed: of torch, numpy and Python while training runs; afterwards their generators stand where they stood
            before. None: they go on from where they stand.
        log_every: steps between the entries of the metrics; the last step has one, too.
        eval_every: steps between evaluations. None: there is one after the last step, where there is data for it.
        checkpoint_every: steps between checkpoints. None: one before the first step and one after the last.
        keep_checkpoints: how many of the latest checkpoints are kept. None: all, as curves over training need.

    Raises:
        ConfigError: values that are not possible, with all reasons.
    """

    steps: int
    optimizer: str = "AdamW"
    learning_rate: float = 1e-3
    weight_decay: float | None = None
    decay: Decay = "all"
    optimizer_options: Mapping[str, Any] | Options = ()
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    accumulate: int = 1
    autocast: Autocast = None
    seed: int | None = None
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int | None = None

    def __post_init__(self) -> None:
        problems = []
        for name, reader in _READERS.items():
            try:
                object.__setattr__(self, name, reader(getattr(self, name), what=name, error=ConfigError))
            except ConfigError as found:
                problems.append(str(found))
        refuse(problems or self._combination_problems(), _OWNER)

    def _combination_problems(self) -> list[str]:
        problems = optimizer_problems(self.optimizer, dict(self.optimizer_options), self.weight_decay)
        if self.warmup_steps > self.steps:
            problems.append(f"warmup_steps={self.warmup_steps} is more than steps={self.steps}")
        if self.schedule == "inverse_sqrt" and not self.warmup_steps:
            problems.append("schedule='inverse_sqrt' falls from the end of the warm-up on: give warmup_steps")
        if self.decay == "matrices" and any("no 'weight_decay'" in one or "has none" in one for one in problems):
            problems.append("decay='matrices' chooses what decays, and nothing does")
        return problems

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values; `TrainConfig.from_dict` reads them back to an equal config."""
        options = {
            name: list(one) if isinstance(one, tuple) else one for name, one in dict(self.optimizer_options).items()
        }
        given = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(self)}
        return {**given, "optimizer_options": options}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """Build a config from what `to_dict` gave (also after a trip through JSON).

        Raises:
            ConfigError: unknown fields, or none of the needed ones.
        """
        if not isinstance(values, Mapping):
            raise refusal(values, _OWNER, "its fields by name", ConfigError)
        known = [spec.name for spec in dataclasses.fields(cls)]
        unknown = [str(name) for name in values if name not in known]
        if unknown or "steps" not in values:
            told = [f"unknown field {name!r}.{suggest_names(name, known)}" for name in unknown]
            told += [] if "steps" in values else ["steps is missing"]
            raise ConfigError(f"{_OWNER}: {'; '.join(told)} (fields: {', '.join(known)})")
        return cls(**values)

    def replace(self, **changes: Any) -> "TrainConfig":
        """A copy with some fields changed, checked anew; an unknown field is a `TypeError`."""
        return dataclasses.replace(self, **changes)

    def list_changes(self, earlier: "TrainConfig") -> list[str]:
        """How a run under `earlier` differs from one under this, where that decides the weights."""
        free = {"log_every", "eval_every", "checkpoint_every", "keep_checkpoints"}
        if self.schedule in _OPEN_ENDED:
            free.add("steps")
        mine, other = self.to_dict(), earlier.to_dict()
        return [
            f"{name} is {mine[name]!r}, was {other[name]!r}"
            for name in mine
            if name not in free and mine[name] != other[name]
        ]


def _read_options(given: object, *, what: str, error: type[HookLensError]) -> Options:
    expected = "options by name, which are numbers, texts, True, False, None, or lists of numbers"
    if isinstance(given, tuple):
        pairs = all(isinstance(pair, tuple) and len(pair) == 2 for pair in given)
        given = dict(given) if pairs else given
    if not isinstance(given, Mapping):
        raise refusal(given, what, expected, error)
    options = {name: tuple(value) if isinstance(value, list | tuple) else value for name, value in given.items()}
    for name, value in options.items():
        each = value if isinstance(value, tuple) else (value,)
        if not isinstance(name, str) or not all(isinstance(one, str | int | float | bool | None) for one in each):
            raise refusal(given, what, expected, error)
    return tuple(sorted(options.items()))


def _read_positive(given: object, *, what: str, error: type[HookLensError]) -> float:
    return read_number(given, what=what, expected="a finite number above 0", allows=lambda one: one > 0, error=error)


def _read_from_zero(given: object, *, what: str, error: type[HookLensError]) -> float:
    return read_number(given, what=what, expected="a finite number >= 0", allows=lambda one: one >= 0, error=error)


_COUNT: Reader = partial(read_int, least=1)
_READERS: dict[str, Reader] = {
    "steps": _COUNT,
    "optimizer": read_text,
    "learning_rate": _read_from_zero,
    "weight_decay": optional(_read_from_zero),
    "decay": partial(read_one_of, options=get_args(Decay)),
    "optimizer_options": _read_options,
    "schedule": partial(read_one_of, options=get_args(Schedule)),
    "warmup_steps": partial(read_int, least=0),
    "max_grad_norm": optional(_read_positive),
    "accumulate": _COUNT,
    "autocast": partial(read_one_of, options=("bfloat16", "float16", None)),
    "seed": optional(read_seed),
    "log_every": _COUNT,
    "eval_every": optional(_COUNT),
    "checkpoint_every": optional(_COUNT),
    "keep_checkpoints": optional(_COUNT),
}
