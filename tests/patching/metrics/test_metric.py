import numpy as np
import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError
from hooklens.patching import KL, FractionRecovered, LogitDiff, Loss, Probability, SiteError
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens


def ragged(side="right"):
    lengths = (6, 4)
    rows = [
        [row[0, :n] for row, n in zip(random_tokens(2, 6, seed=seed).split(1), lengths, strict=True)] for seed in (1, 2)
    ]
    (clean, mask), (corrupted, _) = pad_rows(rows[0], side), pad_rows(rows[1], side)
    return rows, clean, corrupted, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("metric", [KL(pos=None), LogitDiff(3, 5, pos=None), Probability(4, pos=None), Loss()])
@pytest.mark.filterwarnings("ignore::hooklens.patching.SmallDifferenceWarning")
def test_means_over_all_positions_leave_padding_out(metric, side):
    """Columns that pad the shorter prompts of a batch were part of the mean."""
    model = make_model("grouped")
    rows, clean, corrupted, mask = ragged(side)
    scaled = FractionRecovered(metric)
    sites = patching.grid("z", layers=1)
    together = [
        patching.sweep(model, clean, corrupted, sites, each, attention_mask=mask, progress=False).per_pair
        for each in (metric, scaled)
    ]
    for i in range(2):
        alone = [
            patching.sweep(model, rows[0][i][None], rows[1][i][None], sites, each, progress=False).per_pair[..., 0]
            for each in (metric, scaled)
        ]
        torch.testing.assert_close([values[..., i] for values in together], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        (np.int64(-1), -1),
        (torch.tensor(2), 2),
        (np.array([0, -1]), (0, -1)),
        (torch.tensor([1, 2]), (1, 2)),
        (range(3), (0, 1, 2)),
        ([1], (1,)),
        (None, None),
    ],
)
def test_positions_are_numbers_of_any_kind(given, plain):
    """`np.int64(-1)` was no int and failed as a list; arrays and tensors failed further down."""
    model = make_model("grouped")
    clean, corrupted = random_tokens(2, 5), random_tokens(2, 5, seed=9)
    with unchecked():
        found = patching.sweep(model, clean, corrupted, "z", LogitDiff(3, 5, pos=given), progress=False)
    expected = patching.sweep(model, clean, corrupted, "z", LogitDiff(3, 5, pos=plain), progress=False)
    assert torch.equal(found.per_pair, expected.per_pair)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (True, "LogitDiff: pos=True"),
        ([True, False], "is a mask"),
        (1.0, r"pos=1\.0"),
        ("last", "pos='last'"),
        ([], "is empty"),
        ([1, 1], r"names \[1\] more than once"),
        (slice(2), "is a slice"),
        (torch.ones(2), "expected an int"),
    ],
)
def test_what_is_no_position_is_refused(given, match):
    """`pos=True` read position 1."""
    with unchecked(), pytest.raises(InputError, match=match):
        LogitDiff(3, 5, pos=given)


def test_positions_are_resolved_in_each_prompt():
    metric = LogitDiff(3, 5, pos=[-1, 0, -3])
    assert metric.find_reads((6, 4), 6) == [[5, 0, 3], [3, 0, 1]]
    assert LogitDiff(3, 5, pos=None).find_reads((2, 1), 2) == [[0, 1], [0, 1]]
    with pytest.raises(SiteError, match=r"reads positions \[4\], which do not lie in every prompt; the shortest has 4"):
        LogitDiff(3, 5, pos=[0, 4]).find_reads((6, 4), 6)
    # Each position would count once by its name, and twice in the mean.
    with pytest.raises(SiteError, match=r"names \[3\] more than once"):
        LogitDiff(3, 5, pos=[-1, 3]).find_reads((6, 4), 6)
