"""What `routers.check_routing` finds, and what it lets pass."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hooklens import HookedCausalLM
from hooklens.config import MoEConfig
from tests.adapters.families.checks import save
from tests.adapters.families.routers import check_routing
from tests.adapters.families.test_mixtral import TINY
from tests.annotations import unchecked
from tests.checkpoints import load_apart


def load(folder: Path, **changes: object) -> HookedCausalLM:
    """The model of a folder, its mixture changed."""
    model = HookedCausalLM.from_pretrained(folder)
    mixture = model.cfg.mlp
    assert isinstance(mixture, MoEConfig)
    changed = HookedCausalLM(model.cfg.replace(mlp=MoEConfig(**{**mixture.options, **changes})))
    changed.load_state_dict(model.state_dict())
    return changed


def test_two_experts_that_a_router_cannot_tell_apart_are_a_tie(tmp_path) -> None:
    """Either may be chosen, and the tie is told; without one there are none."""
    folder = save(tmp_path, "mixtral", **TINY)
    assert check_routing(load(folder), folder) == 0
    tensors = load_apart(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("gate.weight"):
            tensor[3] = tensor[1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    n_ties = check_routing(load(folder), folder)
    assert 0 < n_ties < 2 * 3 * 19


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate_norm": None}, "gates differ"),
        ({"gate_norm": 2.0}, "gates differ"),
        ({"experts_per_token": 3}, "go else"),
    ],
)
def test_other_gates_and_other_choices_are_found(changes, message: str, tmp_path) -> None:
    folder = save(tmp_path, "mixtral", **TINY)
    with pytest.raises(AssertionError, match=message):
        check_routing(load(folder, **changes), folder)


def test_other_logits_are_found(tmp_path) -> None:
    folder = save(tmp_path, "mixtral", **TINY)
    model = load(folder)
    with unchecked(), torch.no_grad():
        model.blocks[1].mlp.W_router.mul_(1.001)
    with pytest.raises(AssertionError, match="layer 1: router logits differ"):
        check_routing(model, folder)
