from dataclasses import replace

import pytest
import torch

from hooklens import patching
from hooklens.errors import HookLensError, InputError
from hooklens.patching import Circuit, EdgeChoice, EdgeScores, LogitDiff
from hooklens.patching.results.statistics import bootstrap_interval, permutation_p_value
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens

MODEL = make_model("grouped")
CLEAN, CORRUPTED = random_tokens(5, 4, seed=1), random_tokens(5, 4, seed=2)


def score(**options):
    return patching.edge_attribution(MODEL, CLEAN, CORRUPTED, LogitDiff(3, 5), progress=False, **options)


SCORES = score()


def test_intervals_and_p_values_of_edges():
    """Scores had standard errors alone."""
    pytest.importorskip("scipy")
    low, high = SCORES.bootstrap(n_resamples=99)
    p_values = SCORES.permutation_test()
    values = SCORES.per_pair[SCORES.exists]
    expected = bootstrap_interval(values, n_resamples=99)
    assert torch.equal(low[SCORES.exists], expected.low)
    assert torch.equal(high[SCORES.exists], expected.high)
    assert torch.equal(p_values[SCORES.exists], permutation_p_value(values, torch.zeros(5).to(values)))
    for found in (low, high, p_values, SCORES.standard_errors):
        assert torch.equal(found.isnan(), ~SCORES.exists)


def test_statistics_are_of_the_pairs_in_which_an_edge_was_scored():
    pytest.importorskip("scipy")
    per_pair = SCORES.per_pair.clone()
    logits = SCORES.readers.index("logits")
    per_pair[:, logits, 3:] = torch.nan
    part = replace(SCORES, per_pair=per_pair)
    low, _ = part.bootstrap(n_resamples=99)
    assert torch.equal(low[:, logits], bootstrap_interval(SCORES.per_pair[:, logits, :3], n_resamples=99).low)
    torch.testing.assert_close(part.standard_errors[0, logits], per_pair[0, logits, :3].std() / 3**0.5)
    one = torch.zeros(1)
    alone = replace(SCORES, per_pair=SCORES.per_pair[..., :1], clean_per_pair=one, corrupted_per_pair=one)
    with unchecked(), pytest.raises(HookLensError, match="at least two pairs; no edge was scored in more than one"):
        alone.permutation_test()


def test_tables_and_plots_have_them_on_request():
    pytest.importorskip("scipy")
    table = SCORES.to_dataframe(statistics=["permutation_test", "standard_error"])
    assert list(table.columns) == ["writer", "reader", "score", "standard_error", "p_value"]
    edge = SCORES.writers.index(table.writer[0]), SCORES.readers.index(table.reader[0])
    assert table.p_value[0] == float(SCORES.permutation_test()[edge])
    with unchecked(), pytest.raises(HookLensError, match="statistics is 'variance'"):
        SCORES.to_dataframe(statistics=["variance"])
    figure = SCORES.plot(mark="permutation_test")
    unclear = (SCORES.permutation_test() > 0.05) & SCORES.exists
    assert [[text != "" for text in row] for row in figure.data[0].text] == unclear.tolist()
    drawn = torch.tensor(figure.data[0].z, dtype=torch.float64)
    assert torch.equal(drawn.isnan(), ~SCORES.exists)
    torch.testing.assert_close(drawn[SCORES.exists], SCORES.scores[SCORES.exists])
    assert SCORES.plot(backend="matplotlib", title="edges").get_suptitle() == "edges"


@pytest.mark.parametrize("options", [{}, {"method": "exact"}, {"batch_size": 2}])
def test_sums_alone_give_the_same_means_and_errors(options, tmp_path):
    """The scores of 1,000 pairs took 0.3 GiB, whether one wanted more than their mean or not."""
    whole, sums = score(**options), score(keep_pairs=False, **options)
    assert sums.per_pair is None
    # Sums over groups round otherwise than sums over all pairs.
    torch.testing.assert_close(sums.scores, whole.scores, rtol=0, atol=1e-12)
    torch.testing.assert_close(sums.standard_errors, whole.standard_errors, rtol=0, atol=1e-12, equal_nan=True)
    assert sums.top(10) == whole.top(10)
    assert len(sums.circuit(20)) == 20
    assert (sums.clean, sums.forwards, sums.tokens) == (whole.clean, whole.forwards, whole.tokens)
    assert list(sums.to_dataframe().columns) == ["writer", "reader", "score", "standard_error"]
    with pytest.raises(HookLensError, match="run edge_attribution with keep_pairs=True"):
        sums.bootstrap()
    sums.save(tmp_path / "sums.safetensors")
    loaded = EdgeScores.load(tmp_path / "sums.safetensors")
    assert loaded.per_pair is None
    assert torch.equal(loaded.scores, sums.scores)


def test_memory_of_scores_is_taken_once():
    """Results copied what the run had filled in."""
    tallies = []
    begin = patching.runs.tally.Tally.begin

    def note(self, *given):
        tallies.append(self)
        begin(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patching.runs.tally.Tally, "begin", note)
        scores = score()
    assert scores.per_pair.data_ptr() == tallies[0].per_pair().data_ptr()


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_contributions_have_the_sign_of_the_behaviour(direction):
    """Edge by edge on exact values: an edge contributes where its clean output moves the metric to the clean side."""
    found = score(direction=direction)
    towards = 1.0 if found.clean > found.corrupted else -1.0
    expected = found.scores * towards * (-1.0 if direction == "noise" else 1.0)
    assert torch.equal(found.contributions, expected)
    assert torch.equal(found.edges.scores, expected)
    # The same with a metric that falls where the other rises.
    other = patching.edge_attribution(MODEL, CLEAN, CORRUPTED, LogitDiff(5, 3), progress=False, direction=direction)
    torch.testing.assert_close(other.contributions, found.contributions, rtol=0, atol=1e-12)


def test_what_works_for_the_behaviour_helps():
    """The whole of the contributions is the difference between both runs, where the network is linear in the edges."""
    exact = score(method="exact")
    edge = exact._table(exact.contributions).top(1, signed=True)[0]
    without = Circuit.full(MODEL.cfg).without_edges([edge])
    run = patching.evaluate_circuits(MODEL, CLEAN, CORRUPTED, [without], LogitDiff(3, 5), progress=False)
    moved = float(run.values[0]) - run.full
    assert moved * (exact.clean - exact.corrupted) < 0
    row, column = exact.writers.index(edge[0]), exact.readers.index(edge[1])
    assert abs(moved) == pytest.approx(float(exact.contributions[row, column]), abs=1e-9)


def test_without_two_sides_there_are_no_contributions():
    flat = replace(SCORES, corrupted_per_pair=SCORES.clean_per_pair)
    with pytest.raises(HookLensError, match=r"have the same LogitDiff.*choose edges by absolute scores"):
        _ = flat.contributions
    assert torch.equal(flat.edges.scores, SCORES.scores)
    assert flat.circuit(5) == SCORES.circuit(5)
    with pytest.raises(HookLensError, match="have the same LogitDiff"):
        flat.circuit(5, choice=EdgeChoice(by="signed"))


def test_choices_of_edges():
    signed = EdgeChoice(search="top", by="signed")
    contributions = {
        (writer, reader): float(SCORES.contributions[row, column])
        for row, writer in enumerate(SCORES.writers)
        for column, reader in enumerate(SCORES.readers)
        if SCORES.exists[row, column]
    }
    ranked = sorted(contributions, key=lambda edge: contributions[edge], reverse=True)
    assert SCORES.circuit(9, choice=signed) == Circuit(ranked[:9])
    assert SCORES.circuit(9, choice=EdgeChoice(search="top")) == SCORES.circuit(9, connected=False)
    assert SCORES.auroc(Circuit(SCORES.top(5))) == 1.0


def test_selection_frequency_is_that_of_choices_of_resampled_pairs():
    choice = EdgeChoice(search="top", by="signed")
    found = SCORES.selection_frequency(6, choice=choice, n_draws=11, seed=3)
    generator = torch.Generator().manual_seed(3)
    expected = torch.zeros_like(found)
    for _ in range(11):
        drawn = torch.randint(5, (5,), generator=generator)
        resampled = replace(SCORES, per_pair=SCORES.per_pair[..., drawn])
        expected += resampled.edges.to_mask(resampled.circuit(6, choice=choice))
    assert torch.equal(found, expected / 11)
    with pytest.raises(HookLensError, match="from which none can be drawn; run edge_attribution with keep_pairs=True"):
        score(keep_pairs=False).selection_frequency(3)
    with pytest.raises(InputError, match="selection_frequency: n_draws is 0"):
        SCORES.selection_frequency(3, n_draws=0)


def test_stable_edges_are_those_whose_interval_has_one_sign():
    pytest.importorskip("scipy")
    stable = SCORES.stable_edges(n_resamples=99)
    low, high = SCORES.bootstrap(n_resamples=99, method="percentile")
    agreed = SCORES.exists & ((low > 0) | (high < 0))
    assert 0 < int(agreed.sum()) < int(SCORES.exists.sum())
    assert torch.equal(stable.scores, torch.where(agreed, SCORES.edges.scores, 0.0))


def test_the_display_shows_the_largest_scores():
    """The scores printed all their tensors, 251 lines."""
    listing = SCORES._summary().listing
    table = SCORES.to_dataframe()
    assert [tuple(row[:2]) for row in listing.rows[:20]] == list(
        table[["writer", "reader"]].itertuples(index=False, name=None)
    )[:20]
    assert [row[2] for row in listing.rows[:20]] == table["score"].tolist()[:20]
    assert listing.size == int(SCORES.exists.sum())
    assert len(repr(SCORES).splitlines()) == 20
