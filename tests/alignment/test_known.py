"""Alignment search on a model whose circuit is known: it finds each variable where it is, and controls do not."""

from dataclasses import replace

import pytest
import torch

from hooklens.alignment import AlignmentError, Basis, Counterfactuals, DasOptions, Site, search, train_das
from hooklens.patching import known
from tests.annotations import unchecked

INDUCTION = known.induction()
QUERY = Counterfactuals.of_known(INDUCTION, 1000, variables=["query"])
QUICK = DasOptions(steps=50, lr=0.05)


def test_labels_are_what_the_algorithm_answers():
    clean, corrupted = INDUCTION.prompts(1000)
    assert torch.equal(QUERY.base, clean)
    assert torch.equal(QUERY.sources["query"], corrupted)
    expected = INDUCTION.answer(clean, {"query": corrupted[:, -1]})
    assert torch.equal(QUERY.labels, expected)
    assert torch.equal(QUERY.source_values["query"], corrupted[:, -1])
    with pytest.raises(
        AlignmentError, match=r"'induction' has no variables \['asked'\]; it has \['answer', 'previous', "
    ):
        Counterfactuals.of_known(INDUCTION, 5, variables=["asked"])
    with unchecked(), pytest.raises(AlignmentError, match="expected a KnownCircuit"):
        Counterfactuals.of_known(INDUCTION.model, 5)


def test_rows_without_an_answer_are_left_out():
    """Of two variables at once, this algorithm answers only prompts whose first listed token is even."""

    def answer(tokens, values):
        found = INDUCTION.algorithm(tokens, values)
        return found.masked_fill(tokens[:, 1] % 2 == 1, -1) if len(values) == 2 else found

    picky = replace(INDUCTION, algorithm=answer)
    clean, corrupted = picky.prompts(100)
    kept = clean[:, 1] % 2 == 0
    assert 0 < int(kept.sum()) < 100
    data = Counterfactuals.of_known(picky, 100, variables=["query", "previous"])
    assert torch.equal(data.base, clean[kept])
    assert torch.equal(data.sources["previous"], corrupted[kept])
    assert torch.equal(data.source_values["query"], corrupted[kept][:, -1])
    with pytest.raises(AlignmentError, match="has no answer to any of 3 rows"):
        Counterfactuals.of_known(replace(picky, algorithm=_never_two), 3, variables=["query", "previous"])


def _never_two(tokens, values):
    found = INDUCTION.algorithm(tokens, values)
    return torch.full_like(found, -1) if len(values) == 2 else found


@pytest.mark.parametrize(
    "controls",
    [
        ["placebo", "full"],
        # Beside these, by default, in the search on a network whose weights are set by hand.
        pytest.param(["random_model", "arbitrary_labels", "placebo", "full"], marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_das_finds_the_query_and_controls_do_not(controls):
    """The bar is 0.99 on held-out rows."""
    table = search(
        INDUCTION.model,
        QUERY,
        layers=[1],
        positions=[-1, -2],
        n_dims=32,
        options=QUICK,
        controls=controls,
        progress=False,
    )
    assert float(table.accuracy[0, 0]) >= 0.99
    # Eleven listed tokens can be answers: chance is about 0.1.
    assert float(table.accuracy[0, 1]) < 0.25
    for name in controls[:-1]:
        assert float(table.controls[name].accuracy.max()) < 0.25, name
    assert float(table.controls["full"].accuracy[0, 0]) >= 0.99
    variable = INDUCTION.variables["query"]
    truth = Basis(variable.hook_name, variable.basis)
    # By chance 32 of 128 directions overlap by 0.25.
    assert table.bases[1, 11]["query"].overlap(truth) > 0.5


@pytest.mark.parametrize("name", ["query", "answer"])
def test_das_finds_variables_at_their_own_sites(name):
    variable = INDUCTION.variables[name]
    data = Counterfactuals.of_known(INDUCTION, 1000, variables=[name])
    site = Site(variable.hook_name, variable.pos, variable.head)
    result = train_das(INDUCTION.model, data, site, n_dims=len(variable.basis), options=QUICK, progress=False)
    assert result.accuracy >= 0.99


def test_mean_differences_find_the_query_too():
    table = search(INDUCTION.model, QUERY, layers=[1], positions=[-1], method="mean_differences", progress=False)
    assert float(table.accuracy) >= 0.99
