import pytest
import torch

from hooklens.model.parameters import ModelWeights
from hooklens.verification.conformance.declarations import ANEW, DECLARED, TAKES_PART, declaration_stages
from hooklens.verification.probe import make_probe
from tests.annotations import unchecked
from tests.model.networks import ALL_CONFIGS, make_model
from tests.verification.conformance.parts import only


def results_of(model):
    with unchecked(), torch.no_grad():
        return [result for _, run in declaration_stages(make_probe(model)) for result in run()]


def failures_of(model):
    return [(result.check, result.subject, result.message) for result in results_of(model) if not result.passed]


@pytest.mark.parametrize("network", ALL_CONFIGS)
def test_sound_networks_pass(network):
    model = make_model(network)
    results = results_of(model)
    assert not [str(result) for result in results if not result.passed]
    by_check = {check: {one.subject for one in results if one.check == check} for check in (DECLARED, TAKES_PART, ANEW)}
    assert by_check[DECLARED] == set(model.named_weights())
    assert by_check[TAKES_PART] == set(dict(model.named_parameters()))
    assert by_check[ANEW] == {"config as a dict", "state_dict", "named weights", "safetensors", "load_state_dict"}


def make(kind):
    (source,) = only(kind).values()
    return source()


def test_a_weight_that_is_not_used():
    found = failures_of(make("spare"))
    assert [(check, subject) for check, subject, _ in found] == [
        (TAKES_PART, f"blocks.{layer}.mlp.W_spare") for layer in (0, 1)
    ]
    assert "no gradient reaches it" in found[0][2]


def test_a_gradient_that_is_not_finite():
    found = failures_of(make("endless"))
    assert {check for check, _, _ in found} == {TAKES_PART}
    assert any(subject.endswith("in_proj.weight") for _, subject, _ in found)
    assert "its gradient is not finite" in found[0][2]


def test_a_number_that_is_no_weight():
    found = failures_of(make("secret"))
    assert [(check, subject) for check, subject, _ in found] == [
        (ANEW, subject) for subject in ("state_dict", "named weights", "safetensors", "load_state_dict")
    ]
    assert "in neither weights nor config" in found[0][2]


def test_a_weight_of_another_shape(monkeypatch):
    model = make("squares for tests")
    read = ModelWeights.__getitem__
    monkeypatch.setattr(
        ModelWeights, "__getitem__", lambda self, name: read(self, name).T if "W_in" in name else read(self, name)
    )
    found = failures_of(model)
    assert (DECLARED, "blocks.0.mlp.W_in", "found [24, 16], declared [16, 24]") in found
    # And it cannot be put together again.
    assert ("checks run to their end", ANEW) in [(check, subject) for check, subject, _ in found]


def test_the_model_is_left_as_it_was():
    model = make("squares for tests")
    model.embed.W_E.requires_grad_(requires_grad=False)
    next(iter(model.parameters())).requires_grad_(requires_grad=False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    results_of(model)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())


def test_of_part_draws_the_same_again():
    one, other = (make("squares for tests") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
