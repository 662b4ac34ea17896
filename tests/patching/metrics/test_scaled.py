import warnings

import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import FractionRecovered, LogitDiff, MetricError, SmallDifferenceWarning
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_fractions_and_normalized_values_are_each_others_scale(direction):
    """A mean of ratios and a ratio of means disagreed, and ran opposite ways under `noise`, unsaid."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(4, 5), random_tokens(4, 5, seed=9)
    inner = LogitDiff([1, 2, 3, 4], 5)
    sweep = [
        patching.sweep(model, clean, corrupted, "resid_pre", metric, direction=direction, progress=False)
        for metric in (FractionRecovered(inner), inner)
    ]
    fractions, plain = sweep
    # The formula itself gives exactly 1 and 0.
    assert (fractions.clean, fractions.corrupted) == (1.0, 0.0)
    low, high = plain.corrupted_per_pair, plain.clean_per_pair
    torch.testing.assert_close(fractions.per_pair, (plain.per_pair - low) / (high - low))
    forwards = plain.normalized_per_pair if direction == "denoise" else 1 - plain.normalized_per_pair
    torch.testing.assert_close(fractions.per_pair, forwards)
    torch.testing.assert_close(fractions.values, forwards.mean(-1))
    start, end = (low, high) if direction == "denoise" else (high, low)
    ratio_of_means = (plain.values - start.mean()) / (end.mean() - start.mean())
    torch.testing.assert_close(plain.normalized, ratio_of_means)
    assert float((plain.normalized - plain.normalized_per_pair.mean(-1)).abs().max()) > 1e-3


def test_given_ends_are_the_scale():
    """Ends of one's own were replaced by those of the runs."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    inner = LogitDiff(1, 2)
    plain = patching.sweep(model, clean, corrupted, "resid_pre", inner, progress=False)
    for ends in ((torch.tensor(1.0), torch.tensor(3.0)), (torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]))):
        metric = FractionRecovered(inner, ends=ends)
        result = patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
        torch.testing.assert_close(result.per_pair, (plain.per_pair - ends[0]) / 2)
        torch.testing.assert_close(result.clean_per_pair, (plain.clean_per_pair - ends[0]) / 2)
    with pytest.raises(InputError, match="ends has 3 rows; expected 1 or one per pair"):
        patching.sweep(model, clean, corrupted, "z", FractionRecovered(inner, ends=(torch.zeros(3), torch.ones(3))))


def test_small_differences_are_reported():
    """A pair whose two runs nearly agree has a fraction that outweighs all others."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(3, 5), random_tokens(3, 5, seed=9)
    difference = (model(clean) - model(corrupted)).detach()[:, -1]
    # For the middle pair, the two tokens between whose logits the runs differ least.
    gaps = (difference[1][:, None] - difference[1]).abs() + torch.eye(23) * 9
    first, second = divmod(int(gaps.argmin()), 23)
    metric = FractionRecovered(LogitDiff([0, first, 1], [2, second, 3]))
    with pytest.warns(SmallDifferenceWarning, match=r"nearly agree in 1 of 3 pairs: 1 \(\d\.\d\d%\)"):
        patching.sweep(model, clean, corrupted, "resid_pre", metric, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = FractionRecovered(LogitDiff(first, second))
        patching.sweep(model, clean[[1]], corrupted[[1]], "resid_pre", one, progress=False)


def test_a_function_is_scaled_with_all_pairs_at_hand(monkeypatch):
    """The scaled function was handed groups of pairs, and took row `i` for pair `i`."""
    model = make_model("rotary")
    clean, corrupted = random_tokens(3, 5), random_tokens(3, 5, seed=9)
    monkeypatch.setattr("hooklens.patching.runs.memory.assume_free_bytes", lambda device: 0)
    answers = torch.tensor([3, 4, 5])

    def of_row(logits):
        return logits[torch.arange(len(answers)), -1, answers]

    found = patching.sweep(model, clean, corrupted, "z", FractionRecovered(of_row), progress=False)
    plain = patching.sweep(model, clean, corrupted, "z", of_row, progress=False)
    torch.testing.assert_close(found.per_pair, plain.normalized_per_pair)


def test_refusals():
    model = make_model("rotary")
    clean = random_tokens(2, 5)
    with pytest.raises(InputError, match=r"pairs \[0, 1\] have the same value"):
        patching.sweep(model, clean, clean, "resid_pre", FractionRecovered(LogitDiff(1, 2)), progress=False)
    with pytest.raises(InputError, match="give pos=2 to that one"):
        FractionRecovered(LogitDiff(1, 2), pos=2)
    logits = torch.zeros(3, 4, 7)
    with pytest.raises(MetricError, match="was not prepared"):
        FractionRecovered(LogitDiff(1, 2))(logits)
    with pytest.raises(MetricError, match="ends has 2 rows for 3 rows of logits"):
        FractionRecovered(LogitDiff(1, 2), ends=(torch.zeros(2), torch.ones(2)))(logits)
    with unchecked():
        for ends in (3, (torch.zeros(2),), (torch.zeros(2, 2), torch.ones(2)), (0.0, 1.0)):
            with pytest.raises(InputError, match="FractionRecovered"):
                FractionRecovered(LogitDiff(1, 2), ends=ends)
        with pytest.raises(MetricError, match="got int"):
            FractionRecovered(3)
