import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching.known import KnownCircuit, check
from tests.annotations import unchecked
from tests.patching.known.test_induction import auroc


@pytest.fixture(scope="module")
def known() -> KnownCircuit:
    # At 150 steps of 400 all answers are right, and training takes most of the time of these tests.
    return patching.known.train_small_algorithm(n_values=4, steps=150, progress=False)


def every_prompt(n_values=4):
    numbers = torch.cartesian_prod(*[torch.arange(n_values)] * 3)
    return torch.cat([numbers, torch.full((len(numbers), 1), n_values)], 1)


def test_every_prompt_is_answered(known):
    tokens = every_prompt()
    expected = torch.tensor([min(max(x, lower), upper) for x, lower, upper, _ in tokens.tolist()])
    assert torch.equal(known.answer(tokens), expected)
    with torch.no_grad():
        assert torch.equal(known.model(tokens)[:, -1].argmax(-1), expected)


def test_variables_of_the_algorithm(known):
    tokens = every_prompt()
    others = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))]
    rows = list(zip(tokens.tolist(), others.tolist(), strict=True))
    by_hand = {
        "operands": [min(max(other[0], other[1]), own[2]) for own, other in rows],
        "raised": [min(max(other[0], other[1]), own[2]) for own, other in rows],
        "upper": [min(max(own[0], own[1]), other[2]) for own, other in rows],
        "answer": [min(max(other[0], other[1]), other[2]) for own, other in rows],
    }
    for name, expected in by_hand.items():
        assert known.answer(tokens, {name: known.variables[name].value(others)}).tolist() == expected
    # A variable that is set hides what it is computed from.
    both = {name: known.variables[name].value(others) for name in ("operands", "upper")}
    both["raised"] = known.variables["raised"].value(tokens)
    expected = [min(max(own[0], own[1]), other[2]) for own, other in rows]
    assert known.answer(tokens, both).tolist() == expected


def test_the_circuit_holds(known):
    found = check(known, n=300)
    assert found.accuracy == 1.0
    assert min(found.interchange.values()) >= 0.99
    assert found.strictness >= 0.99
    assert found.least_inside >= 0.99
    assert found.most_outside <= 0.01


def test_methods_find_it(known):
    pairs = known.pairs(32, seed=3)
    exact = patching.edge_attribution(known.model, pairs, metric=known.metric, method="exact", progress=False)
    inside = [abs(exact[edge]) for edge in known.circuit]
    outside = exact.to_dataframe()
    outside = outside[[edge not in known.circuit for edge in zip(outside["writer"], outside["reader"], strict=True)]]
    assert outside["score"].abs().max() < 0.25 * min(inside)
    # Between the effects of the edges outside and inside.
    found = patching.discover_circuit(known.model, pairs, metric=known.metric, threshold=2.5, progress=False)
    assert found.circuit == known.circuit
    by_method = [
        patching.edge_attribution(known.model, pairs, metric=known.metric, method=method, progress=False)
        for method in ("eap", "eap-ig-inputs", "eap-ig-activations")
    ]
    assert max(auroc(scores, known.circuit) for scores in by_method) >= 0.95


def test_the_seed_chooses_heads_and_leaves_the_global_state():
    state = torch.get_rng_state()
    circuits = {
        patching.known.train_small_algorithm(n_values=3, steps=1, seed=seed, progress=False).circuit.edges
        for seed in range(6)
    }
    assert len(circuits) > 2
    assert torch.equal(torch.get_rng_state(), state)


def test_dtype():
    known = patching.known.train_small_algorithm(n_values=3, steps=1, dtype=torch.float64, progress=False)
    assert known.model.dtype == known.variables["raised"].basis.dtype == torch.float64


@unchecked()
def test_refusals():
    with pytest.raises(InputError, match="n_values is 2, expected a whole number, 3 to 64"):
        patching.known.train_small_algorithm(n_values=2)
    with pytest.raises(InputError, match="steps is 0"):
        patching.known.train_small_algorithm(steps=0)
    with pytest.raises(InputError, match="dtype is 'int8'"):
        patching.known.train_small_algorithm(dtype="int8")
