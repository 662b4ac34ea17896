from dataclasses import replace

import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import Circuit, SiteError
from hooklens.patching.known import KnownCircuit
from tests.annotations import unchecked


@pytest.fixture(scope="module")
def known() -> KnownCircuit:
    return patching.known.induction()


def test_pairs_are_seeded_and_bring_their_answers(known):
    state = torch.get_rng_state()
    first, again, other = known.pairs(5), known.pairs(5, seed=0), known.pairs(5, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for one, same in zip(first, again, strict=True):
        assert torch.equal(one.clean, same.clean)
        assert torch.equal(one.corrupted, same.corrupted)
    assert not all(torch.equal(one.clean, another.clean) for one, another in zip(first, other, strict=True))
    clean, corrupted = known.prompts(5)
    assert torch.equal(clean, torch.stack([pair.clean for pair in first]))
    assert torch.equal(corrupted, torch.stack([pair.corrupted for pair in first]))
    assert [pair.answer for pair in first] == known.answer(clean).tolist()
    assert [pair.wrong for pair in first] == known.answer(corrupted).tolist()
    assert all(pair.answer != pair.wrong for pair in first)


def test_what_pairs_measure(known):
    """The metric reads the answers that pairs bring along, so it needs nothing else."""
    scores = patching.edge_attribution(known.model, known.pairs(3), metric=known.metric, progress=False)
    clean, corrupted = known.prompts(3)
    rows = torch.arange(3)
    for tokens, found in ((clean, scores.clean_per_pair), (corrupted, scores.corrupted_per_pair)):
        logits = known.model(tokens, return_type="logits").detach()[:, -1]
        by_hand = logits[rows, known.answer(clean)] - logits[rows, known.answer(corrupted)]
        assert torch.allclose(found, by_hand, atol=1e-5)


def test_a_value_that_is_set_stands_in_for_the_prompts_own(known):
    tokens, others = known.prompts(4)
    for variable in known.variables.values():
        assert torch.equal(known.answer(tokens, {variable.name: variable.value(tokens)}), known.answer(tokens))
    set_to = {name: variable.value(others) for name, variable in known.variables.items() if name != "answer"}
    assert torch.equal(known.answer(tokens, set_to), known.answer(others))


def test_repr(known):
    text = repr(known)
    assert text.startswith("KnownCircuit('induction': 5 of 81 edges")
    assert all(f"{writer} -> {reader}" in text for writer, reader in known.circuit)
    assert "variable 'query': 32 directions of blocks.1.hook_resid_pre, pos -1" in text
    many = replace(known, circuit=Circuit.full(known.model.cfg), variables={})
    assert len(repr(many).splitlines()) <= 20
    assert "... and 73 more" in repr(many)


def test_variables_cannot_be_replaced(known):
    with pytest.raises(TypeError):
        known.variables["query"] = known.variables["token"]


@unchecked()
def test_refusals(known):
    tokens, _ = known.prompts(2)
    with pytest.raises(InputError, match=r"known circuit 'induction': n is 0, expected a whole number"):
        known.pairs(0)
    with pytest.raises(InputError, match="known circuit 'induction': seed is 'a'"):
        known.pairs(2, seed="a")
    with pytest.raises(
        InputError, match=r"tokens is a tensor \[12\] of torch.int64; expected token ids \[prompt pos\]"
    ):
        known.answer(tokens[0])
    with pytest.raises(InputError, match=r"variable 'query': tokens is a tensor \[2, 12\] of torch.float32"):
        known.variables["query"].value(tokens.float())
    with pytest.raises(InputError, match=r"has no variable 'qery'.*'query'"):
        known.answer(tokens, {"qery": tokens[:, -1]})
    with pytest.raises(InputError, match=r"the value of 'query' is a tensor \[2, 12\].*expected a tensor \[2\]"):
        known.answer(tokens, {"query": tokens})
    with pytest.raises(InputError, match=r"the value of 'query' is 3; expected a tensor \[2\] of torch.int64"):
        known.answer(tokens, {"query": 3})
    with pytest.raises(InputError, match=r"values is \[\], expected values by the name of the variable"):
        known.answer(tokens, [])
    with pytest.raises(SiteError, match="the circuit does not fit the network"):
        replace(known, circuit=Circuit([("m0", "logits")]))
    astray = replace(known.variables["query"], hook_name="blocks.7.hook_resid_pre")
    with pytest.raises(SiteError, match=r"no hook points of variables \[\"'query' at 'blocks.7.hook_resid_pre'\"\]"):
        replace(known, variables={"query": astray})
