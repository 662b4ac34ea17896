"""`TrainConfig`: what it refuses, with all reasons, and its way through JSON."""

import copy
import dataclasses
import json
import pickle

import numpy as np
import pytest

from hooklens.errors import ConfigError
from hooklens.training import TrainConfig
from tests.annotations import unchecked


def test_numpys_numbers_are_pythons() -> None:
    with unchecked():
        config = TrainConfig(steps=np.int64(10), learning_rate=np.float32(0.5))
    assert type(config.steps) is int
    assert type(config.learning_rate) is float


def test_through_json_and_back() -> None:
    config = TrainConfig(
        steps=10, learning_rate=3e-4, schedule="cosine", warmup_steps=2, autocast="bfloat16", seed=3,
        optimizer_options={"betas": [0.9, 0.98], "amsgrad": True}, max_grad_norm=None, keep_checkpoints=2,
    )  # fmt: skip
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert dict(config.optimizer_options) == {"betas": (0.9, 0.98), "amsgrad": True}
    assert config.replace(steps=10) == copy.deepcopy(config) == pickle.loads(pickle.dumps(config))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"steps": 0, "log_every": 0.5, "decay": "some"}, ["steps is 0", "log_every is 0.5", "decay is 'some'"]),
        ({"optimizer": "AdamX"}, ["optimizer='AdamX' is no optimiser of torch.optim", "AdamW"]),
        ({"optimizer": "LBFGS"}, ["wants a closure or sparse gradients"]),
        ({"optimizer": "SparseAdam"}, ["wants a closure or sparse gradients"]),
        ({"optimizer": "Optimizer"}, ["is no optimiser"]),
        ({"optimizer_options": {"beta": 1, "lr": 2.0}}, ["takes no 'beta'. Did you mean 'betas'", "learning_rate=..."]),
        ({"optimizer_options": {"betas": object()}}, ["optimizer_options is", "expected options by name"]),
        ({"optimizer_options": 3}, ["expected options by name"]),
        ({"optimizer": "Rprop", "weight_decay": 0.1}, ["torch.optim.Rprop has none"]),
        ({"warmup_steps": 9}, ["warmup_steps=9 is more than steps=5"]),
        ({"schedule": "inverse_sqrt"}, ["give warmup_steps"]),
        ({"autocast": "int8"}, ["autocast is 'int8', expected 'bfloat16', 'float16' or None"]),
        ({"seed": 2.5, "max_grad_norm": -1}, ["seed is 2.5", "max_grad_norm is -1"]),
        ({"learning_rate": float("nan")}, ["learning_rate is nan"]),
    ],
)
def test_what_is_impossible_is_refused(given, words) -> None:
    with unchecked(), pytest.raises(ConfigError) as refused:
        TrainConfig(**{"steps": 5, **given})
    assert [word for word in words if word not in str(refused.value)] == []


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown field 'step'. Did you mean 'steps'.*steps is missing"):
        TrainConfig.from_dict({"step": 1})
    with unchecked(), pytest.raises(ConfigError, match="expected its fields by name"):
        TrainConfig.from_dict(3)
    with pytest.raises(TypeError, match="lr"):
        TrainConfig(steps=1, lr=3)


def test_what_decides_the_weights_is_compared() -> None:
    config = TrainConfig(steps=5, schedule="linear", log_every=2)
    assert config.replace(log_every=7, checkpoint_every=3).list_changes(config) == []
    assert config.replace(steps=6, decay="matrices").list_changes(config) == [
        "steps is 6, was 5", "decay is 'matrices', was 'all'",
    ]  # fmt: skip
    constant = config.replace(schedule="constant")
    assert constant.replace(steps=9).list_changes(constant) == []
