import json

import pytest
import torch

from hooklens import HookedCausalLM, PartConfig
from hooklens.errors import ConfigError, InputError
from hooklens.verification import conformance
from tests.annotations import unchecked
from tests.model.networks import make_config
from tests.verification.conformance.parts import Squares

PART = PartConfig(kind="squares for tests")
TINY = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "vocab_size": 11, "n_positions": 16}


def test_networks_around_a_part():
    state = torch.get_rng_state()
    models = {name.removeprefix(f"{PART.kind} "): make() for name, make in conformance.of_part(PART).items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert list(models) == ["in sequence", "in parallel", "in the last layer", "alone"]
    standing = {
        name: [isinstance(block.mlp, Squares) for block in model.block_list()] for name, model in models.items()
    }
    assert standing == {
        "in sequence": [True, True], "in parallel": [True, True], "in the last layer": [False, True],
        "alone": [True, True],
    }  # fmt: skip
    assert models["in parallel"].cfg.wiring == "parallel"
    assert all(block.attn is None for block in models["alone"].cfg.blocks)
    for model in models.values():
        assert not model.training
        assert all(float(parameter.detach().std()) > 0.1 for parameter in model.parameters())


def test_another_network_around_it():
    models = conformance.of_part(PART, cfg=make_config(n_layers=1, d_model=20), seed=3)
    assert [name.removeprefix(f"{PART.kind} ") for name in models] == ["in sequence", "in parallel", "alone"]
    assert {make().cfg.d_model for make in models.values()} == {20}


def test_a_part_at_the_attentions_place():
    models = conformance.of_part(PartConfig(kind="attention"), place="attn")
    assert models["attention alone"]().cfg.block(0).mlp is None


def test_checkpoints_of_a_family():
    models = conformance.of_family({"plain": TINY, "two": {**TINY, "n_layer": 2}})
    folder = models["two"]()
    assert models["two"]() == folder
    assert json.loads((folder / "config.json").read_text())["n_layer"] == 2
    loaded = HookedCausalLM.from_pretrained(folder)
    assert loaded.cfg.n_layers == 2
    # Norm weights and biases are as random as all others.
    assert all(float(parameter.detach().std()) > 0.05 for parameter in loaded.parameters())
    del models, loaded
    assert not folder.exists()


@unchecked()
def test_refusals():
    with pytest.raises(InputError, match="of_part: part is 'mlp', expected a PartConfig"):
        conformance.of_part("mlp")
    with pytest.raises(InputError, match="of_part: place is 'norm', expected 'attn' or 'mlp'"):
        conformance.of_part(PART, place="norm")
    with pytest.raises(ConfigError, match="no part of the kind 'absent' stands at"):
        conformance.of_part(PartConfig(kind="absent"))
    with pytest.raises(InputError, match="of_part: cfg is 3, expected a HookedConfig or None"):
        conformance.of_part(PART, cfg=3)
    with pytest.raises(InputError, match="of_family: configs is empty"):
        conformance.of_family({})
    with pytest.raises(InputError, match="of_family: 'one' has no 'model_type'"):
        conformance.of_family({"one": {"n_embd": 8}})
