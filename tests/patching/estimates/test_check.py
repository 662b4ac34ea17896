import math
import warnings
from itertools import combinations

import numpy as np
import pytest
import torch

from hooklens import patching
from hooklens.errors import HookLensError, InputError
from hooklens.patching import AttributionResult, EstimateCheck, EstimateWarning, LogitDiff
from hooklens.patching.estimates.check import choose_cells
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

METRIC = LogitDiff(3, 5)
MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(3, 5, seed=1), random_tokens(3, 5, seed=2)
SITES = ["resid_pre", patching.grid("z", positions="each")]


def estimate(**options):
    return patching.attribution(MODEL, CLEAN, CORRUPTED, SITES, METRIC, progress=False, **options)


@pytest.fixture(scope="module")
def exact():
    result = patching.sweep(MODEL, CLEAN, CORRUPTED, SITES, METRIC, progress=False)
    return (result.values - result.corrupted).flatten()


def quiet_check(result, *arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EstimateWarning)
        return result.check(*arguments, progress=False, **options)


def test_all_cells_give_the_correlation_with_the_sweep(exact):
    result = estimate()
    check = quiet_check(result, None)
    assert check.n_cells == len(exact) == len(check.cells)
    assert check.pearson == pytest.approx(np.corrcoef(result.effects.flatten(), exact)[0, 1], abs=1e-12)
    order = result.effects.flatten().abs().argsort(descending=True, stable=True)
    torch.testing.assert_close(check.exact, exact[order], rtol=0, atol=1e-10)
    torch.testing.assert_close(check.estimated, result.effects.flatten()[order], rtol=0, atol=0)
    assert [cell["site"] for cell in check.cells] == [result.cells[i]["site"] for i in order]
    large = torch.maximum(exact.abs(), result.effects.flatten().abs()) >= 0.01 * exact.abs().max()
    right = result.effects.flatten().sign() == exact.sign()
    assert check.sign_agreement == pytest.approx(float(right[large].double().mean()))
    assert len(check.sign_errors) == int((~right & large).sum())
    assert check.bound().n_cells == 0


def test_a_sample_stands_for_what_is_not_in_the_top(exact):
    """The mean over draws of weighted moments is that of all cells."""
    result = estimate()
    totals = []
    for seed in range(30):
        check = quiet_check(result, 6, sample=8, seed=seed)
        assert check.is_top.tolist() == [True] * 6 + [False] * 8
        assert float(check.weights.sum()) == pytest.approx(len(exact))
        totals.append(float((check.weights * check.exact).sum()))
    assert abs(np.mean(totals) - float(exact.sum())) < 4 * np.std(totals) / math.sqrt(len(totals))
    assert len({tuple(map(str, quiet_check(result, 6, sample=8, seed=seed).cells)) for seed in range(5)}) == 5


def make_check(estimated, exact, *, n_top, n_cells):
    n = len(exact)
    return EstimateCheck(
        cells=tuple({"site": "x", "pos": i} for i in range(n)),
        estimated=torch.tensor(estimated),
        exact=torch.tensor(exact),
        is_top=torch.arange(n) < n_top,
        n_cells=n_cells,
        method="atp, rules norms",
    )


def test_the_weighted_correlation_is_that_of_a_table_with_copies():
    estimated, exact = [3.0, -2.0, 0.5, 0.1, -0.2], [2.5, 1.0, 0.4, 0.3, -0.1]
    check = make_check(estimated, exact, n_top=2, n_cells=11)
    copies = [1, 1, 3, 3, 3]
    expected = np.corrcoef(np.repeat(estimated, copies), np.repeat(exact, copies))[0, 1]
    assert check.pearson == pytest.approx(expected)
    # The second cell has the wrong sign; all are above a hundredth of the largest.
    assert check.sign_agreement == pytest.approx(10 / 11)
    assert check.sign_errors["pos"].tolist() == [1]


def test_the_bound_holds_by_counting():
    """Of all ways to place `j + 1` large cells among those that are not in the top, a sample of 3 sees none in at most
    5 %; for `j` cells it is more."""
    check = make_check([1.0, 0.5, 0.1, 0.3], [1.0, -0.4, 0.2, 0.1], n_top=1, n_cells=13)
    bound = check.bound(0.95)
    assert bound.effect == pytest.approx(0.4)
    assert bound.error == pytest.approx(0.9)

    def chance(large):
        placed = list(combinations(range(12), large))
        return sum(not set(one) & {0, 1, 2} for one in placed) / len(placed)

    assert chance(bound.n_cells + 1) <= 0.05 < chance(bound.n_cells)
    assert make_check([1.0, 0.5], [1.0, 0.4], n_top=2, n_cells=9).bound().n_cells == 7
    with unchecked(), pytest.raises(InputError, match="confidence is 1; expected a number between 0 and 1"):
        check.bound(1)


def test_poor_estimates_warn_and_the_display_tells():
    result = estimate(rules="gradient")
    assert "not checked" in repr(result)
    poor = patching.attribution(
        MODEL, CLEAN, CORRUPTED, patching.grid("q", positions="each"), METRIC, rules=[patching.HoldPattern()],
        progress=False,
    )  # fmt: skip
    with pytest.warns(EstimateWarning, match=r"atp, rules HoldPattern\) has a correlation of nan with exact patches"):
        check = poor.check(3, sample=4, progress=False)
    assert poor.checked is check
    assert check.summary in " ".join(repr(poor).split())
    assert check.summary in poor.plot(backend="plotly").layout.title.text
    assert len(repr(poor).splitlines()) <= 20
    assert "checked on 3 top and 4 random of" in repr(check)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = patching.attribution(MODEL, CLEAN, CLEAN, "resid_pre", METRIC, progress=False)
        assert math.isnan(same.check(2, sample=2, progress=False).pearson)


def test_noise_and_edges(exact):
    noise = estimate(direction="noise")
    check = quiet_check(noise, None)
    swept = patching.sweep(MODEL, CLEAN, CORRUPTED, SITES, METRIC, direction="noise", progress=False)
    effects = (swept.values - swept.clean).flatten()
    assert check.pearson == pytest.approx(np.corrcoef(noise.effects.flatten(), effects)[0, 1], abs=1e-12)
    scores = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, progress=False)
    all_exact = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, method="exact", progress=False)
    check = quiet_check(scores, 5, sample=7)
    for cell, value in zip(check.cells, check.exact.tolist(), strict=True):
        assert value == pytest.approx(all_exact[cell["writer"], cell["reader"]], abs=1e-10)
    whole = quiet_check(scores, None)
    expected = np.corrcoef(scores.scores[scores.exists], all_exact.scores[scores.exists])[0, 1]
    assert whole.pearson == pytest.approx(expected, abs=1e-12)
    assert whole.summary in " ".join(repr(scores).split())
    assert whole.summary in scores.plot(backend="plotly").layout.title.text


def test_refusals(tmp_path):
    result = estimate()
    with unchecked():
        with pytest.raises(InputError, match="check: k is -1, expected a whole number >= 0"):
            result.check(-1)
        with pytest.raises(InputError, match=r"sample is 2\.5, expected a whole number"):
            result.check(3, sample=2.5)
    with pytest.raises(InputError, match="k=1 and sample=0 leave fewer than two cells to compare"):
        result.check(1, sample=0)
    result.save(tmp_path / "estimate")
    loaded = AttributionResult.load(tmp_path / "estimate")
    assert torch.equal(loaded.per_pair, result.per_pair)
    assert (loaded.method, loaded.rules) == ("atp", "norms")
    with pytest.raises(HookLensError, match="read from a file, which holds neither model nor prompts"):
        loaded.check()
    scores = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, direction="denoise", progress=False)
    with pytest.raises(HookLensError, match="exchange the prompts, and estimate with direction='noise'"):
        scores.check()
    exact = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, METRIC, method="exact", progress=False)
    with pytest.raises(HookLensError, match="these scores are exact"):
        exact.check()
    scores.save(tmp_path / "scores")
    with pytest.raises(HookLensError, match="read from a file"):
        type(scores).load(tmp_path / "scores").check()


def test_chosen_cells():
    strengths = torch.tensor([0.1, -3.0, float("nan"), 2.0, 0.0])
    assert choose_cells(strengths, 2, 0, 0, what="check") == ([1, 3], [])
    top, drawn = choose_cells(strengths, 2, 2, 0, what="check")
    assert top == [1, 3]
    assert len(set(drawn)) == 2
    assert set(drawn) <= {0, 2, 4}
    assert choose_cells(strengths, None, 2, 0, what="check")[1] == []
    assert choose_cells(strengths, 9, 9, 0, what="check") == ([1, 3, 0, 2, 4], [])
