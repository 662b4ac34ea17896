import math

import pytest
import torch

from hooklens.patching.learned.gates import log_alpha_of, open_probability, sample_gates


def draw(log_alpha, n=20_000, seed=0):
    parameter = torch.full((n,), log_alpha, dtype=torch.float64, requires_grad=True)
    return parameter, sample_gates(parameter, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("log_alpha", [-3.0, -0.5, 0.0, 1.0, 4.0])
def test_shares_of_open_and_of_whole_gates_are_those_of_the_distribution(log_alpha):
    gates = draw(log_alpha)[1]
    # P(s > x) of a binary concrete variable, written out: 0 is cut off at s = 0.1 / 1.2, 1 at s = 1.1 / 1.2.
    open_, whole = (1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(x / (1 - x))))) for x in (0.1 / 1.2, 1.1 / 1.2))
    # Four standard errors of a share of 20,000.
    assert float((gates > 0).double().mean()) == pytest.approx(open_, abs=0.015)
    assert float((gates == 1).double().mean()) == pytest.approx(whole, abs=0.015)
    assert float(open_probability(torch.tensor(log_alpha, dtype=torch.float64))) == pytest.approx(open_, abs=1e-12)


def test_parameters_of_a_probability():
    wanted = torch.tensor([0.01, 0.5, 0.95], dtype=torch.float64)
    torch.testing.assert_close(open_probability(log_alpha_of(wanted)), wanted, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_formula_between_the_ends_and_0_at_them():
    parameter, gates = draw(0.3, n=2000)
    (found,) = torch.autograd.grad(gates.sum(), parameter)
    s = ((gates.detach() + 0.1) / 1.2).double()
    inside = (gates > 0) & (gates < 1)
    expected = torch.where(inside, 1.2 * s * (1 - s) / (2 / 3), 0.0)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert bool(inside.any())
    assert not bool(inside.all())


def test_the_seed_says_what_is_drawn():
    state = torch.get_rng_state()
    assert torch.equal(draw(0.0, seed=3)[1], draw(0.0, seed=3)[1])
    assert not torch.equal(draw(0.0, seed=3)[1], draw(0.0, seed=4)[1])
    assert torch.equal(state, torch.get_rng_state())
    # float32 parameters draw the same numbers, rounded, and none of them is infinite.
    narrow = sample_gates(torch.zeros(20_000), torch.Generator().manual_seed(3))
    torch.testing.assert_close(narrow.double(), draw(0.0, seed=3)[1].detach(), rtol=0, atol=1e-5)
