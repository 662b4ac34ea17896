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
    assert text.startswith("KnownCircuit 'induction': 5 of 81 edges")
    lines = [line.split() for line in text.splitlines()]
    assert all(list(edge) in lines for edge in known.circuit)
    assert ["variable", "'query'", "32", "directions", "of", "blocks.1.hook_resid_pre,", "pos", "-1"] in lines
    many = replace(known, circuit=Circuit.full(known.model.cfg), variables={})
    assert len(repr(many).splitlines()) <= 20
    assert [line.split()[:2] for line in repr(many).splitlines()].count(["embed", "logits"]) == 1
    assert "... 65 more edges" in repr(many)


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
    query = known.variables["query"]
    for changes, text in (
        ({"hook_name": "blocks.7.hook_resid_pre"}, r"'blocks.7.hook_resid_pre', which is no hook point of the model"),
        ({"hook_name": "blocks.1.attn.hook_q"}, r"lives at 'blocks.1.attn.hook_q' .*, which is no part of the stream"),
        ({"basis": query.basis[:, :5]}, r"the basis .* is a tensor \[32, 5\] .* expected one \[direction, 128\]"),
        ({"head": 1}, "the head of variable 'query' is 1, expected None, for it has no heads"),
        ({"hook_name": "blocks.1.attn.hook_result"}, "is None, expected one of 0 to 3"),
        ({"hook_name": "blocks.1.attn.hook_result", "head": 4}, "is 4, expected one of 0 to 3"),
    ):
        with pytest.raises(SiteError, match=f"known circuit 'induction': .*{text}"):
            replace(known, variables={"query": replace(query, **changes)})


def test_a_task_without_pairs_is_refused(known):
    """Where prompts and others are always the same, no variable makes a difference."""

    def draw(n, generator):
        clean, _ = known.draw(n, generator)
        return clean, clean

    with pytest.raises(InputError, match="of 50 draws of prompts none held a pair in which every variable makes"):
        replace(known, draw=draw).pairs(2)


def test_every_variable_makes_a_difference_in_every_pair(known):
    clean, corrupted = known.prompts(200, seed=3)
    own = known.answer(clean)
    assert (own != known.answer(corrupted)).all()
    for name, variable in known.variables.items():
        other = known.answer(clean, {name: variable.value(corrupted)})
        assert ((other != own) & (other >= 0)).all()
