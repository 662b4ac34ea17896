"""Optimisers by name: what decays, and what torch refuses."""

import pytest
import torch
from torch import nn

from hooklens.errors import ConfigError
from hooklens.training import TrainConfig
from hooklens.training.optimizers import make_optimizer, make_schedule
from tests.training.networks import make_model


def test_what_decays() -> None:
    model = make_model(tied_unembed=True)
    optimizer = make_optimizer(model, TrainConfig(steps=1, decay="matrices", weight_decay=0.3))
    decays = {id(one): group["weight_decay"] for group in optimizer.param_groups for one in group["params"]}
    names = {name: decays[id(one)] for name, one in model.named_parameters()}
    assert {name for name, decay in names.items() if decay} == {name for name in names if name.endswith("_proj.weight")}
    assert set(names.values()) == {0.0, 0.3}


def test_rates_are_those_of_the_formulas() -> None:
    for schedule, expected in {
        "constant": [0.0, 0.5, 1, 1, 1, 1, 1, 1],
        "linear": [0.0, 0.5, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        "inverse_sqrt": [0.0, 0.5, *((2 / step) ** 0.5 for step in range(2, 8))],
    }.items():
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        rates = make_schedule(optimizer, TrainConfig(steps=8, warmup_steps=2, schedule=schedule))
        found = []
        for _ in range(8):
            found.append(rates.get_last_lr()[0] / 2.0)
            optimizer.step()
            rates.step()
        assert found == pytest.approx(expected)


def test_what_torch_refuses_is_told_as_a_config() -> None:
    with pytest.raises(ConfigError, match=r"train config: torch.optim.AdamW with options .*betas"):
        make_optimizer(make_model(), TrainConfig(steps=1, optimizer_options={"betas": [2.0, 0.9]}))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no such optimiser")
def test_parameters_that_an_optimiser_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"torch.optim.Muon"):
        make_optimizer(make_model(), TrainConfig(steps=1, optimizer="Muon"))
