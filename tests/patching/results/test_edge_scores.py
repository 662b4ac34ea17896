from dataclasses import replace

import pytest
import torch

from hooklens import patching
from hooklens.errors import HookLensError
from hooklens.patching import EdgeScores, LogitDiff
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
