import pytest
import torch

from hooklens.errors import InputError
from hooklens.patching import KL, FractionRecovered, FunctionMetric, LogitDiff, LogProb, Pair, split_pairs
from hooklens.patching.pairs.prompts import read_pairs
from hooklens.patching.studies.split import take_metric, take_pairs
from tests.annotations import unchecked
from tests.model.networks import make_model, pad_rows, random_tokens

MODEL = make_model("grouped")
PAIRS = [
    Pair(random_tokens(1, 4 + row % 2, seed=row)[0], random_tokens(1, 4 + row % 2, seed=90 + row)[0],
         answer=[row, row + 1] if row % 2 else row, wrong=22 - row)
    for row in range(7)
]  # fmt: skip


def test_every_pair_is_in_one_part_with_its_answers():
    before = torch.random.get_rng_state()
    found = split_pairs(MODEL, PAIRS, fraction=0.4, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(found.discovery) == 3
    assert sorted(found.discovery_rows + found.evaluation_rows) == list(range(7))
    assert repr(found).splitlines()[0] == "PairSplit(3 pairs for discovery, 4 for evaluation)"
    for part, rows in ((found.discovery, found.discovery_rows), (found.evaluation, found.evaluation_rows)):
        for pair, row in zip(part, rows, strict=True):
            assert torch.equal(pair.clean, PAIRS[row].clean)
            assert torch.equal(pair.corrupted, PAIRS[row].corrupted)
            assert pair.answer == ([row, row + 1] if row % 2 else [row])
            assert pair.wrong == [22 - row]
    assert split_pairs(MODEL, PAIRS, fraction=0.4, seed=3).discovery_rows == found.discovery_rows
    drawn = {split_pairs(MODEL, PAIRS, fraction=0.4, seed=seed).discovery_rows for seed in range(9)}
    assert len(drawn) > 4


def test_both_parts_have_a_pair():
    assert len(split_pairs(MODEL, PAIRS, fraction=0.01).discovery) == 1
    assert len(split_pairs(MODEL, PAIRS, fraction=0.99).evaluation) == 1
    with pytest.raises(InputError, match=r"there is 1 pair, which cannot be parted; .* \(split=None\)"):
        split_pairs(MODEL, PAIRS[:1])
    with pytest.raises(InputError, match=r"split_pairs: fraction is 1\.0, expected a number between 0 and 1"):
        split_pairs(MODEL, PAIRS, fraction=1.0)
    with unchecked(), pytest.raises(InputError, match="split_pairs: seed is 'one'"):
        split_pairs(MODEL, PAIRS, seed="one")


def test_padded_prompts_are_taken_without_their_padding():
    rows = [random_tokens(1, n, seed=n)[0] for n in (3, 5, 4)]
    ids, mask = pad_rows(rows, "right")
    prompts = read_pairs(MODEL, ids, ids, mask)
    assert [pair.clean.tolist() for pair in take_pairs(prompts, [2, 0])] == [rows[2].tolist(), rows[0].tolist()]


def test_answers_that_a_metric_holds_go_with_their_pairs():
    logits = torch.randn(2, 3, 1, 23, dtype=torch.float64)
    metric = LogitDiff([1, 2, 3, 4], [[5, 6], [7, 8], [9, 10], [11, 12]]).encode(MODEL)
    part = take_metric(metric, [3, 1, 0], 4)
    expected = LogitDiff([4, 2, 1], [[11, 12], [7, 8], [5, 6]]).encode(MODEL)
    assert torch.equal(part.measure(logits), expected.measure(logits))
    inner = take_metric(FractionRecovered(metric).encode(MODEL), [3, 1, 0], 4).metric
    assert torch.equal(inner.measure(logits), expected.measure(logits))
    for same in (LogProb(3).encode(MODEL), KL()):
        assert take_metric(same, [0, 2], 4) is same
    assert take_metric(metric, [0, 1, 2, 3], 4) is metric


def test_functions_know_pairs_by_their_row():
    """They would have been given other pairs in these rows, and measured with the wrong answers."""
    with pytest.raises(InputError, match="is a function, which knows pairs by their row"):
        take_metric(FunctionMetric(lambda logits: logits[:, -1, 0]), [1], 2)
