"""Optimisers and learning-rate schedules by name: torch's optimisers, the schedules of transformers."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from hooklens.arguments import show
from hooklens.errors import ConfigError, suggest_names
from hooklens.optional import import_package

if TYPE_CHECKING:
    from hooklens.training.config import TrainConfig

Schedule = Literal["constant", "linear", "cosine", "inverse_sqrt"]

# What has a field of its own in the config.
_FIELDS = ("params", "lr", "weight_decay")
_FIELD_OF = {"lr": "learning_rate", "weight_decay": "weight_decay"}
# A model's gradients are dense.
_SPARSE = ("SparseAdam",)
# Without warm-up its rate is constant from the first step on.
_NAMES = {"constant": "constant_with_warmup"}


def optimizer_problems(name: str, options: Mapping[str, object], weight_decay: float | None) -> list[str]:
    """What is wrong with the name of an optimiser, or with its options."""
    kind = getattr(torch.optim, name, None)
    known = _optimizer_names()
    if name not in known:
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer:
            return [
                f"optimizer={name!r} wants a closure or sparse gradients, which a training step does not have; "
                f"expected one of {', '.join(known)}"
            ]
        return [f"optimizer={name!r} is no optimiser of torch.optim; expected one of {', '.join(known)}"]
    taken = _option_names(name)
    problems = [
        f"optimizer_options: {option!r} is a field of its own, {_FIELD_OF[option]}=..."
        for option in options
        if option in _FIELD_OF
    ]
    unknown = [option for option in options if option not in taken and option not in _FIELD_OF]
    problems += [
        f"optimizer_options: torch.optim.{name} takes no {option!r}.{suggest_names(option, taken)} It takes "
        f"{', '.join(taken)}"
        for option in unknown
    ]
    if weight_decay is not None and "weight_decay" not in inspect.signature(getattr(torch.optim, name)).parameters:
        problems.append(f"weight_decay={weight_decay}: torch.optim.{name} has none; leave it out")
    return problems


def _optimizer_names() -> tuple[str, ...]:
    names = []
    for name, kind in vars(torch.optim).items():
        if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name not in ("Optimizer", *_SPARSE):
            closure = inspect.signature(kind.step).parameters.get("closure")
            if closure is None or closure.default is not inspect.Parameter.empty:
                names.append(name)
    return tuple(sorted(names))


def _option_names(name: str) -> tuple[str, ...]:
    parameters = inspect.signature(getattr(torch.optim, name)).parameters
    return tuple(option for option in parameters if option not in _FIELDS)


def make_optimizer(model: nn.Module, config: "TrainConfig") -> torch.optim.Optimizer:
    """The optimiser of a configuration over the parameters that require gradients.

    Raises:
        ConfigError: torch refuses the options, or the parameters.
    """
    kind = getattr(torch.optim, config.optimizer)
    options: dict[str, Any] = dict(config.optimizer_options)
    if config.weight_decay is not None:
        options["weight_decay"] = config.weight_decay
    try:
        optimizer: torch.optim.Optimizer = kind(_make_groups(model, config), lr=config.learning_rate, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"train config: torch.optim.{config.optimizer} with options {show(options)}: {error}"
        ) from error
    return optimizer


def _make_groups(model: nn.Module, config: "TrainConfig") -> list[dict[str, Any]]:
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if config.decay == "all":
        return [{"params": list(trained.values())}]
    embeddings = {id(one) for part in model.modules() if isinstance(part, nn.Embedding) for one in part.parameters()}
    matrices = {name for name, one in trained.items() if one.ndim > 1 and id(one) not in embeddings}
    groups: list[dict[str, Any]] = [
        {"params": [one for name, one in trained.items() if name in matrices]},
        {"params": [one for name, one in trained.items() if name not in matrices], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_schedule(optimizer: torch.optim.Optimizer, config: "TrainConfig") -> LRScheduler:
    """The schedule of a configuration, at its first step."""
    schedule: LRScheduler = import_package("transformers.optimization").get_scheduler(
        _NAMES.get(config.schedule, config.schedule),
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
    )
    return schedule
