import pytest
import torch

from hooklens.patching import SweepInterruptedError
from hooklens.patching.runs.tally import SumTally, Tally
from tests.annotations import unchecked


def make(n_pairs):
    return Tally(2, n_pairs, dtype=torch.float64, device=torch.device("cpu"))


def test_values_stand_group_by_group():
    tally = make(3)
    assert (tally.n_pairs, tally.n_values, tally.has_begun) == (3, 6, False)
    tally.begin(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5]), [4, 5])
    tally.store([1], torch.tensor([[7.0, 8.0]]))
    assert tally.per_pair().nan_to_num(-1).tolist() == [[-1, -1, -1], [7, 8, -1]]
    assert tally.ends().nan_to_num(-1).tolist() == [[1, 2, -1], [0, 0.5, -1]]
    tally.begin(torch.tensor([3.0]), torch.tensor([0.0]), [6])
    tally.store([0, 1], torch.tensor([[5.0], [6.0]]))
    assert tally.per_pair()[:, 2].tolist() == [5, 6]
    assert tally.n_tokens == 15


def test_where_the_number_of_pairs_is_not_known_it_grows():
    tally = make(None)
    assert (tally.n_pairs, tally.n_values) == (0, None)
    tally.begin(torch.ones(2), torch.zeros(2), [4, 5])
    assert tally.per_pair().shape == (2, 2)


def stop_at(step, tally):
    def work():
        if step == 0:
            raise KeyboardInterrupt
        tally.begin(torch.ones(3), torch.zeros(3), [4, 5, 6])
        tally.store([0], torch.ones(1, 3))
        if step == 1:
            raise ValueError("no more")

    with unchecked():
        return tally.finish("counting", work, tally.per_pair)


def test_what_was_measured_comes_with_the_error():
    """Before the first unpatched run a failure is a mistake in the call."""
    with pytest.raises(KeyboardInterrupt):
        stop_at(0, make(3))
    with pytest.raises(
        SweepInterruptedError, match=r"counting stopped after 3 of 6 values \(ValueError: no more\)"
    ) as caught:
        stop_at(1, make(3))
    assert caught.value.result[0].tolist() == [1, 1, 1]
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(SweepInterruptedError, match=r"counting stopped after 3 values"):
        stop_at(1, make(None))
    assert stop_at(2, make(3)).shape == (2, 3)


def test_rows_that_are_no_cells_hold_nothing_and_do_not_count():
    absent = torch.tensor([True, False])
    tally = Tally(2, 3, dtype=torch.float64, device=torch.device("cpu"), absent=absent)
    tally.begin(torch.ones(2), torch.zeros(2), [4, 4])
    assert (tally.n_values, tally.n_measured) == (3, 0)
    tally.store(slice(None), torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    assert tally.n_measured == 2
    assert tally.per_pair().nan_to_num(-1).tolist() == [[0, 0, 0], [3, 4, -1]]


def test_values_of_a_known_number_of_pairs_are_held_once():
    """Scores of edges were held twice: by the run, and in its result."""
    tally = make(3)
    held = tally.per_pair()
    tally.begin(torch.ones(3), torch.zeros(3), [4, 5, 6])
    tally.store([0], torch.ones(1, 3))
    assert held[0].tolist() == [1, 1, 1]


def test_sums_are_those_of_the_values():
    values = 1e6 + torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tally = SumTally(2, 7, dtype=torch.float64, device=torch.device("cpu"))
    for columns in (values[:, :3], values[:, 3:4], values[:, 4:]):
        n_pairs = columns.shape[1]
        tally.begin(torch.ones(n_pairs), torch.zeros(n_pairs), [4] * n_pairs)
        tally.store([0], columns[:1])
    assert (tally.n_measured, tally.n_values) == (7, 14)
    torch.testing.assert_close(tally.moments.mean[0], values[0].mean())
    # The mean is a million times the spread, so squares of values would lose twelve of sixteen digits.
    torch.testing.assert_close(tally.moments.standard_errors[0], values[0].std() / 7**0.5, rtol=1e-9, atol=0)
    assert bool(tally.moments.mean[1].isnan())
    assert bool(tally.moments.standard_errors[1].isnan())
