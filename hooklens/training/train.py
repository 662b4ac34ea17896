"""Training a model: `train`."""

import contextlib
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hooklens.arguments import optional, read_flag, read_function, read_path, reads, refusal, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.training.batches import FunctionObjective, Loss, NextTokenObjective, Objective
from hooklens.training.config import TrainConfig
from hooklens.training.data import DataStream, check_data, gives_once
from hooklens.training.keeping.folder import RunFolder
from hooklens.training.keeping.randomness import keep_random, seed_random
from hooklens.training.metrics import read_logger
from hooklens.training.result import TrainResult
from hooklens.training.run import TrainingRun


@reads(
    model=partial(require, kind=nn.Module, expected="a model, a torch.nn.Module"),
    config=partial(require, kind=TrainConfig, expected="a TrainConfig(steps=..., ...)"),
    loss=optional(partial(read_function, expected="a function loss(model, batch) that gives a scalar")),
    folder=optional(read_path),
    progress=read_flag,
)
def train(
    model: nn.Module,
    data: Iterable[Any],
    config: TrainConfig,
    *,
    loss: Loss | None = None,
    eval_data: Iterable[Any] | None = None,
    folder: str | Path | None = None,
    logger: object = None,
    progress: bool = True,
) -> TrainResult:
    """Train a model in place, and go on where an earlier call with the same folder was left.

    With a folder, a run that was interrupted, killed at any moment, or failed, and is started again by the same call in
    a new process, ends with the same weights and metrics, bit for bit, as one that ran through: on the same machine,
    versions and number of threads, with deterministic kernels (on CUDA: `torch.use_deterministic_algorithms(True)`),
    and with data as `hooklens.training.data` describes it. A run that is finished is loaded.

    Hooks, edits and captures that are attached to the model act in every step, and gradients flow through them.

    Args:
        model: any module whose parameters can be trained; without `loss` a `HookedCausalLM`.
        data: batches, begun anew when they end: a torch `DataLoader`, a list of tensors, any iterable. Without `loss` a
            batch is token ids `[batch pos]`, a mapping with `input_ids` and any of `attention_mask`, `labels` (-100:
            does not count) and `document_ids`, a `PackedRows`, or a tuple of ids alone.
        config: steps, optimiser, schedule and the rest.
        loss: `loss(model, batch)` gives the scalar to make small; the batch is as it came, its tensors on the model's
            device. None: the mean cross-entropy of the next token, in nats.
        eval_data: batches whose mean loss is measured every `config.eval_every` steps and after the last one, in
            evaluation mode.
        folder: of checkpoints (`checkpoints/`) and metrics (`metrics.jsonl`), made if it does not exist. None: nothing
            is saved.
        logger: gets the metrics, too: an object with `.log(metrics, step=...)`, or a function of metrics and step.
            After a resume it gets those since the checkpoint again.
        progress: show a progress bar.

    Returns:
        The model, in the mode it was in, and the metrics.

    Raises:
        InputError: a model that cannot be trained, data that is none, or batches of another form.
        ConfigError: torch refuses the optimiser's options.
        CheckpointError: the folder holds another run, a checkpoint is damaged, or the data is not that of the run.
        TrainingInterruptedError: Ctrl-C, once: the step is finished and saved. A second one stops at once, and the last
            checkpoint stays.
        DivergedError: the loss is no finite number any more; checkpoints from before stay.
    """
    objective = _choose_objective(model, loss)
    _check_trainable(model, config)
    read = check_data(data, "data")
    read_eval = None if eval_data is None else check_data(eval_data, "eval_data")
    log = read_logger(logger)
    _check_combination(config, read_eval, folder)
    place = None if folder is None else RunFolder(Path(folder))
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_keep_modes(model))
        if place is not None:
            place.open(config, model)
            stack.callback(place.close)
        if config.seed is not None:
            stack.enter_context(keep_random())
            seed_random(config.seed)
        model.train()
        stream = DataStream(read, digests=place is not None)
        run = TrainingRun(
            model, objective, config, stream, eval_data=read_eval, folder=place, log=log, progress=progress
        )
        return run.finish()


def _choose_objective(model: nn.Module, loss: Loss | None) -> Objective:
    if loss is not None:
        return FunctionObjective(loss)
    if not isinstance(model, HookedCausalLM):
        raise refusal(model, "model", "a HookedCausalLM; for other modules give their loss, loss(model, batch)")
    if not model.cfg.causal:
        raise InputError(
            "model: with causal=False every token sees the one after it, so predicting that one teaches nothing; give "
            "a loss of your own, loss(model, batch)"
        )
    return NextTokenObjective()


def _check_trainable(model: nn.Module, config: TrainConfig) -> None:
    """Refuse weights that no optimiser can change.

    Raises:
        InputError: says which, and why.
    """
    weights = dict(model.named_parameters())
    others = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    kinds = {
        "lie on the device 'meta', without values: load or initialise them": [
            name for name, one in weights.items() if one.is_meta
        ],
        "were made under torch.inference_mode: make the model outside of it": [
            name for name, one in weights.items() if one.is_inference()
        ],
        "are quantised: load them in a floating dtype": [
            name
            for name, one in weights.items()
            if one.is_quantized or not (one.is_floating_point() or one.is_complex())
        ],
        "are no tensors, and cannot be saved": others,
    }
    if config.autocast == "float16":
        kinds["are float16, whose gradients the scaling for autocast='float16' cannot use: load them in float32"] = [
            name for name, one in weights.items() if one.dtype == torch.float16 and one.requires_grad
        ]
    problems = [f"{join_names(names, limit=5)} {why}" for why, names in kinds.items() if names]
    if not any(one.requires_grad for one in weights.values()):
        problems.append(
            "it has no parameters" if not weights else "all parameters are frozen: model.requires_grad_() thaws them"
        )
    if problems:
        raise InputError(f"the model cannot be trained: {'; '.join(problems)}")


def _check_combination(config: TrainConfig, eval_data: Iterable[Any] | None, folder: object) -> None:
    problems = []
    if config.eval_every is not None and eval_data is None:
        problems.append(f"eval_every={config.eval_every} asks for evaluations: give eval_data")
    if eval_data is not None and gives_once(eval_data):
        problems.append("eval_data is an iterator, which gives its batches once: give a list or a DataLoader")
    if folder is None:
        asked = {name: getattr(config, name) for name in ("checkpoint_every", "keep_checkpoints")}
        problems += [f"{name}={value} asks for checkpoints: give a folder" for name, value in asked.items() if value]
    if problems:
        raise InputError("; ".join(problems))


@contextlib.contextmanager
def _keep_modes(model: nn.Module) -> Iterator[None]:
    """Each module is in training or evaluation mode afterwards as it was before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
