import warnings

import numpy as np
import pytest
import torch

from hooklens.errors import CheckpointError, HookLensError, InputError
from hooklens.patching import EstimateWarning, LogitDiff, UnitCircuit, UnitScores, evaluate_units, score_units
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

SCORES = UnitScores(
    scores={"a": torch.tensor([1.0, -3.0, 0.5]), "b": torch.tensor([2.0, -0.25])},
    metric="LogitDiff",
    method="atp",
    rules="norms",
    ablation="zero",
)


def test_choices_by_strength_and_by_sign():
    assert SCORES.top(3) == [("a", 1), ("b", 0), ("a", 0)]
    assert SCORES.top(3, by="signed") == [("b", 0), ("a", 0), ("a", 2)]
    assert SCORES.circuit(2) == UnitCircuit({"a": [1], "b": [0]})
    assert SCORES.circuit(1) == UnitCircuit({"a": [1], "b": []})
    assert SCORES["b", 1] == -0.25
    assert SCORES.to_dataframe().score.tolist() == [-3.0, 2.0, 1.0, 0.5, -0.25]
    assert [line.split() for line in repr(SCORES).splitlines()[4:6]] == [
        ["hook", "point", "entry", "score"],
        ["a", "1", "-3.00"],
    ]
    with pytest.raises(InputError, match=r"no unit \('b', 2\); units were scored at a, b"):
        SCORES["b", 2]
    with unchecked(), pytest.raises(InputError, match=r"UnitScores\.top: by is 'size'"):
        SCORES.top(1, by="size")


def test_random_circuits_are_of_a_seed():
    drawn = SCORES.random_circuit(3, seed=2)
    assert len(drawn) == 3
    assert drawn == SCORES.random_circuit(3, seed=2)
    assert len({SCORES.random_circuit(2, seed=seed) for seed in range(20)}) > 4
    with pytest.raises(InputError, match="random_circuit: k is 6"):
        SCORES.random_circuit(6)


def test_files(tmp_path):
    SCORES.save(tmp_path / "units.safetensors")
    again = UnitScores.load(tmp_path / "units.safetensors")
    assert (again.metric, again.method, again.rules, again.ablation) == ("LogitDiff", "atp", "norms", "zero")
    assert all(torch.equal(again.scores[name], SCORES.scores[name]) for name in ("a", "b"))
    with pytest.raises(CheckpointError, match="cannot read scores of units"):
        UnitScores.load(tmp_path / "none.safetensors")
    with pytest.raises(HookLensError, match="read from a file, which holds neither model nor prompts"):
        again.check()


MODEL = make_model("grouped")
NAMES = ["blocks.0.mlp.hook_post", "blocks.1.mlp.hook_post"]
CLEAN, CORRUPTED = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
METRIC = LogitDiff([3, 4, 5], [6, 7, 8])


def estimate(**options):
    return score_units(MODEL, CLEAN, CORRUPTED, NAMES, METRIC, progress=False, **options)


@torch.no_grad()
def value(tokens):
    logits, rows = MODEL(tokens)[:, -1], torch.arange(3)
    return logits[rows, rows + 3] - logits[rows, rows + 6]


def quiet_check(scores, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimateWarning)
        return scores.check(*arguments, progress=False, **options)


@pytest.mark.parametrize("batch_size", ["auto", 2])
def test_a_check_of_all_units_is_the_correlation_with_exact_scores(batch_size):
    scores, exact = estimate(batch_size=batch_size), estimate(method="exact")
    check = quiet_check(scores, None)
    pairs = [[float(one[unit]) for unit in scores.top(len(scores))] for one in (scores, exact)]
    assert check.exact.tolist() == pytest.approx(pairs[1], abs=1e-12)
    assert check.estimated.tolist() == pairs[0]
    assert check.pearson == pytest.approx(np.corrcoef(*pairs)[0, 1], abs=1e-12)
    assert [(cell["name"], cell["unit"]) for cell in check.cells] == scores.top(len(scores))


def test_some_units_are_ablated_each_by_itself():
    scores = estimate(ablation="zero")
    is_larger = float((value(CLEAN) - value(CORRUPTED)).mean()) > 0
    check = quiet_check(scores, 3, sample=4, seed=1)
    assert check.is_top.tolist() == [True] * 3 + [False] * 4
    for cell, effect in zip(check.cells, check.exact.tolist(), strict=True):
        unit = (cell["name"], cell["unit"])
        kept = {name: [one for one in range(20) if (name, one) != unit] for name in NAMES}
        without = evaluate_units(MODEL, CLEAN, CORRUPTED, [UnitCircuit(kept)], METRIC, ablation="zero", progress=False)
        lost = without.full - float(without.values[0])
        assert effect == pytest.approx(lost if is_larger else -lost, abs=1e-10)


def test_what_a_check_found_is_shown():
    scores = estimate()
    assert "not checked: .check(k) ablates the strongest units one by one" in repr(scores)
    found = quiet_check(scores, 5, sample=5)
    assert scores.checked is found
    assert "checked on 5 top and 5 random of 40 cells" in repr(scores)
    assert "atp, rules gradient" in repr(scores)
    exact = estimate(method="exact")
    assert exact.rules == "gradient"
    with pytest.raises(HookLensError, match="these scores are exact"):
        exact.check()


def test_a_poor_estimate_is_warned_of():
    scores = estimate()
    upside_down = UnitScores(
        scores={name: -values for name, values in scores.scores.items()},
        metric=scores.metric,
        method="atp",
        rules="gradient",
        ablation="resample",
        run_exactly=scores.run_exactly,
    )
    with pytest.warns(EstimateWarning, match=r"Try other rules \(rules=...\), or score_units"):
        upside_down.check(None, progress=False)
