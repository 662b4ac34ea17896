from dataclasses import replace

import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import Circuit
from hooklens.patching.known import check
from tests.annotations import unchecked
from tests.patching.known.tasks import make_claim


def train(claim, **options):
    return patching.known.train(claim, **{"steps": 80, "batch_size": 64, "progress": False, **options})


def parameters_of(known):
    return [parameter.detach().clone() for parameter in known.model.parameters()]


def test_a_claim_comes_true():
    claim = make_claim()
    before = check(claim, n=64)
    assert before.accuracy < 0.5
    found = check(train(claim), n=64)
    assert found.accuracy == found.interchange["copied"] == found.strictness == 1.0
    assert found.least_inside == 1.0
    assert found.most_outside == 0.0


def test_without_strictness_the_answer_comes_by_other_ways():
    """The claim that all edges belong to the circuit asks for nothing but answers."""
    claim = make_claim()
    lax = replace(claim, circuit=Circuit.full(claim.model.cfg), variables={})
    trained = replace(train(lax), circuit=claim.circuit)
    found = check(trained, n=64)
    assert found.accuracy == 1.0
    assert found.strictness < 0.9


def test_training_leaves_the_claim_and_the_global_state_alone():
    claim = make_claim()
    weight = next(claim.model.parameters()).requires_grad_(False)
    before, state = parameters_of(claim), torch.get_rng_state()
    with torch.no_grad():
        trained = train(claim, steps=3)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one, other) for one, other in zip(before, claim.model.parameters(), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(before[:2], parameters_of(trained)[:2], strict=True))
    assert all(parameter.grad is None for parameter in claim.model.parameters())
    assert all(parameter.grad is None for parameter in trained.model.parameters())
    wanted = [parameter.requires_grad for parameter in trained.model.parameters()]
    assert wanted == [parameter.requires_grad for parameter in claim.model.parameters()]
    assert not wanted[0]
    assert not weight.requires_grad
    assert not trained.model.training
    assert not claim.model.training
    assert all(point.own is None for point in trained.model.hook_points().values())


def test_inside_inference_mode():
    claim = make_claim()
    with torch.inference_mode():
        trained = train(claim, steps=2)
    assert not any(parameter.is_inference() for parameter in trained.model.parameters())


def test_the_seed_decides():
    claim = make_claim()
    one, same, other = (train(claim, steps=3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(*both) for both in zip(parameters_of(one), parameters_of(same), strict=True))
    assert not all(torch.equal(*both) for both in zip(parameters_of(one), parameters_of(other), strict=True))


def test_an_interrupted_training_leaves_the_claim(monkeypatch):
    claim = make_claim()
    before = parameters_of(claim)
    calls = []

    def algorithm(tokens, values):
        calls.append(len(tokens))
        if len(calls) > 8:
            raise KeyboardInterrupt
        return claim.algorithm(tokens, values)

    with pytest.raises(KeyboardInterrupt):
        train(replace(claim, algorithm=algorithm))
    assert all(torch.equal(one, other) for one, other in zip(before, claim.model.parameters(), strict=True))
    assert all(point.own is None for point in claim.model.hook_points().values())


@unchecked()
def test_refusals():
    claim = make_claim()
    for wrong, text in (
        ({"steps": 0}, "steps is 0, expected a whole number"),
        ({"batch_size": 1.5}, r"batch_size is 1\.5, expected a whole number"),
        ({"learning_rate": 0}, "learning_rate is 0, expected a number > 0"),
        ({"weight_decay": -1}, "weight_decay is -1, expected a number >= 0"),
        ({"seed": None}, "seed is None"),
        ({"progress": 1}, "progress is 1"),
    ):
        with pytest.raises(InputError, match=text):
            train(claim, **wrong)
    with pytest.raises(InputError, match="claim is a HookedCausalLM, expected a KnownCircuit"):
        train(claim.model)
