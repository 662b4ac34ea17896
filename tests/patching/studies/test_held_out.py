import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import EdgeChoice, LogitDiff, held_out_curve
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(6, 5, seed=1), random_tokens(6, 5, seed=2)
ANSWERS, WRONGS = [1, 2, 3, 4, 5, 6], [11, 12, 13, 14, 15, 16]
METRIC = LogitDiff(ANSWERS, WRONGS)
OPTIONS = {"sizes": [3, 20], "random_draws": 1, "progress": False}


def of_rows(rows):
    chosen = list(rows)
    metric = LogitDiff([ANSWERS[row] for row in chosen], [WRONGS[row] for row in chosen])
    return CLEAN[chosen], CORRUPTED[chosen], metric


def test_scores_and_circuits_are_of_different_pairs():
    choice = EdgeChoice(by="signed")
    found = held_out_curve(MODEL, CLEAN, CORRUPTED, METRIC, split=1 / 3, seed=5, choice=choice, **OPTIONS)
    assert len(found.discovery_rows) == 2
    assert sorted(found.discovery_rows + found.evaluation_rows) == list(range(6))
    clean, corrupted, metric = of_rows(found.discovery_rows)
    scores = patching.edge_attribution(MODEL, clean, corrupted, metric, method="eap-ig-inputs", progress=False)
    torch.testing.assert_close(found.scores.scores, scores.scores, rtol=0, atol=1e-12)
    clean, corrupted, metric = of_rows(found.evaluation_rows)
    curve = patching.faithfulness_curve(MODEL, clean, corrupted, scores, metric, choice=choice, seed=5, **OPTIONS)
    assert found.curve.circuits == curve.circuits
    torch.testing.assert_close(found.curve.values, curve.values, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.curve.random.values, curve.random.values, rtol=0, atol=1e-10)
    assert (
        repr(found).splitlines()[0] == "HeldOutCurve(eap-ig-inputs on 2 pairs, 2 circuits on 4 other pairs, LogitDiff)"
    )
    assert len(found.plot().data) == 3


def test_without_a_split_both_are_of_all_pairs():
    found = held_out_curve(MODEL, CLEAN, CORRUPTED, METRIC, split=None, method="eap", **OPTIONS)
    assert found.discovery_rows == found.evaluation_rows == tuple(range(6))
    assert found.curve.result.per_pair.shape == (2, 6)
    assert "on 6 the same pairs" in repr(found)


def test_arguments_are_read_before_work():
    with pytest.raises(InputError, match=r"held_out_curve: split is 0\.0, expected a number between 0 and 1, or None"):
        held_out_curve(MODEL, CLEAN, CORRUPTED, METRIC, split=0.0)
    with unchecked(), pytest.raises(InputError, match="held_out_curve: seed is None"):
        held_out_curve(MODEL, CLEAN, CORRUPTED, METRIC, seed=None)
    with pytest.raises(InputError, match="metric missing"):
        held_out_curve(MODEL, CLEAN, CORRUPTED)
    with pytest.raises(InputError, match="there is 1 pair, which cannot be parted"):
        held_out_curve(MODEL, CLEAN[:1], CORRUPTED[:1], LogitDiff(3, 5))
