import itertools

import pytest
import torch

from hooklens import optional, patching
from hooklens.errors import HookLensError, MissingDependencyError
from hooklens.patching import LogitDiff
from hooklens.patching.results.statistics import bootstrap_interval, permutation_p_value, standard_error
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens


def values(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_standard_errors_are_the_definition():
    per_pair = values(2, 3, 7)
    expected = ((per_pair - per_pair.mean(-1, keepdim=True)).square().sum(-1) / 6).sqrt() / 7**0.5
    torch.testing.assert_close(standard_error(per_pair), expected)


def test_p_values_are_those_of_all_ways_to_flip():
    pytest.importorskip("scipy")
    per_pair, base = values(2, 3, 6) + 0.5, values(6, seed=1)
    differences = per_pair - base
    flips = torch.tensor(list(itertools.product([1.0, -1.0], repeat=6)), dtype=torch.float64)
    means = (flips @ differences.flatten(0, 1).T / 6).T
    observed = differences.mean(-1).flatten()[:, None]
    # 1e-12: ways that give the same mean in another order of sums count as equal.
    more = (means >= observed - 1e-12).double().mean(1)
    less = (means <= observed + 1e-12).double().mean(1)
    for alternative, expected in (
        ("greater", more),
        ("less", less),
        ("two-sided", (2 * torch.minimum(more, less)).clamp(max=1)),
    ):
        found = permutation_p_value(per_pair, base, alternative=alternative)
        torch.testing.assert_close(found.flatten(), expected)


def test_intervals_hold_the_mean_as_often_as_they_say():
    """200 samples of 30 from a normal distribution: 95 % intervals miss its mean in some 10."""
    pytest.importorskip("scipy")
    low, high = bootstrap_interval(values(200, 30), n_resamples=999)
    missed = int(((low > 0) | (high < 0)).sum())
    # The binomial distribution of 200 trials at 5 % to 7 % (intervals of 30 are a little short) ends before 30.
    assert 0 < missed < 30
    narrow = bootstrap_interval(values(4, 30), confidence=0.5, n_resamples=999, method="percentile")
    wide = bootstrap_interval(values(4, 30), confidence=0.99, n_resamples=999, method="percentile")
    assert bool((narrow.low > wide.low).all())
    assert bool((narrow.high < wide.high).all())
    again = bootstrap_interval(values(4, 30), confidence=0.5, n_resamples=999, method="percentile")
    assert torch.equal(narrow.low, again.low)


def test_cells_without_spread_or_values():
    pytest.importorskip("scipy")
    per_pair = values(3, 5)
    per_pair[0] = 2.0
    per_pair[1, 3] = torch.nan
    low, high = bootstrap_interval(per_pair, n_resamples=99)
    assert (float(low[0]), float(high[0])) == (2.0, 2.0)
    assert low.isnan().tolist() == [False, True, False]
    assert permutation_p_value(per_pair, torch.zeros(5)).isnan().tolist() == [False, True, False]
    # Nothing is told from nothing.
    assert float(permutation_p_value(torch.zeros(1, 5), torch.zeros(5))) == 1.0


def test_memory_is_bounded(monkeypatch):
    pytest.importorskip("scipy")
    per_pair, base = values(7, 6), values(6, seed=1)
    whole = bootstrap_interval(per_pair, n_resamples=99), permutation_p_value(per_pair, base)
    monkeypatch.setattr("hooklens.patching.results.statistics._ENTRIES_AT_ONCE", 2000)
    parts = bootstrap_interval(per_pair, n_resamples=99), permutation_p_value(per_pair, base)
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


def test_refusals(monkeypatch):
    for statistic in (standard_error, bootstrap_interval, lambda one: permutation_p_value(one, one[0])):
        with pytest.raises(HookLensError, match="needs at least two pairs; the result has 1"):
            statistic(values(3, 1))
    for options, match in (
        ({"confidence": 1.0}, "confidence is 1.0, expected a number between 0 and 1"),
        ({"n_resamples": 0}, "n_resamples is 0"),
        ({"method": "normal"}, "method is 'normal'"),
    ):
        with unchecked(), pytest.raises(HookLensError, match=match):
            bootstrap_interval(values(3, 4), **options)
    with unchecked(), pytest.raises(HookLensError, match="alternative is 'both'"):
        permutation_p_value(values(3, 4), values(4), alternative="both")
    real = optional.importlib.import_module

    def missing(name):
        if name.startswith("scipy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name="scipy")
        return real(name)

    monkeypatch.setattr(optional.importlib, "import_module", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'hooklens\[stats\]'"):
        bootstrap_interval(values(3, 4))


@pytest.fixture(scope="module")
def result():
    model = make_model("rotary")
    clean, corrupted = random_tokens(6, 4), random_tokens(6, 4, seed=9)
    return patching.sweep(model, clean, corrupted, "resid_pre", LogitDiff(3, 5), progress=False)


def test_tables_have_what_is_asked_for_by_name(result):
    pytest.importorskip("scipy")
    table = result.to_dataframe(statistics=["standard_error", "bootstrap", "permutation_test"])
    assert list(table.columns[-4:]) == ["standard_error", "low", "high", "p_value"]
    assert table["standard_error"].tolist() == result.standard_errors.flatten().tolist()
    assert table["low"].tolist() == result.bootstrap().low.flatten().tolist()
    assert table["p_value"].tolist() == result.permutation_test().flatten().tolist()
    assert "low" not in result.to_dataframe()
    with unchecked(), pytest.raises(HookLensError, match="statistics is 'variance', expected 'standard_error'"):
        result.to_dataframe(statistics=["variance"])


@pytest.mark.parametrize("mark", ["bootstrap", "permutation_test"])
def test_plots_mark_cells_that_cannot_be_told_from_none(result, mark):
    pytest.importorskip("scipy")
    if mark == "permutation_test":
        expected = result.permutation_test() > 0.05
    else:
        low, high = bootstrap_interval(result.per_pair - result.base_per_pair)
        expected = (low <= 0) & (high >= 0)
    figure = result.plot(mark=mark)
    assert [[text == "\N{MULTIPLICATION SIGN}" for text in row] for row in figure.data[0].text] == expected.tolist()
    assert f"not told from no patch ({mark.replace('_', ' ')})" in figure.layout.title.text
    drawn = result.plot(backend="matplotlib", mark=mark)
    places = {(text.get_position()[1], text.get_position()[0]) for text in drawn.axes[0].texts}
    assert places == {tuple(place) for place in expected.nonzero().tolist()}
    with unchecked(), pytest.raises(HookLensError, match="plot: mark is 'stars'"):
        result.plot(mark="stars")


@pytest.mark.parametrize(
    "run",
    [
        lambda *given: patching.attribution(*given, "mlp_out", LogitDiff(3, 5), progress=False),
        lambda *given: patching.path_patch(*given, ["m0", "a0.h1"], ["logits"], LogitDiff(3, 5), progress=False),
    ],
    ids=["attribution", "paths"],
)
def test_other_experiments_have_the_same(run):
    pytest.importorskip("scipy")
    found = run(make_model("rotary"), random_tokens(6, 4), random_tokens(6, 4, seed=9))
    table = found.to_dataframe(statistics=["standard_error", "permutation_test"])
    assert table["standard_error"].tolist() == standard_error(found.per_pair).flatten().tolist()
    expected = permutation_p_value(found.per_pair, found.corrupted_per_pair)
    assert table["p_value"].tolist() == expected.flatten().tolist()
    assert found.plot(mark="permutation_test") is not None
