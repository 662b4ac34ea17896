import torch

from hooklens.patching.results.moments import Moments


def test_groups_of_single_pairs_add_up_to_all():
    values = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = Moments.none(3, device=torch.device("cpu"))
    for pair in range(5):
        found = found.add([2, 0], values[[2, 0], pair : pair + 1])
    assert found.n.tolist() == [5, 0, 5]
    # Sums of a few numbers of size 1 in float64.
    torch.testing.assert_close(found.mean[[0, 2]], values[[0, 2]].mean(1), rtol=0, atol=1e-14)
    torch.testing.assert_close(found.standard_errors[[0, 2]], values[[0, 2]].std(1) / 5**0.5, rtol=0, atol=1e-14)
    assert bool(found.mean[1].isnan())
    assert bool(found.standard_errors[1].isnan())


def test_adding_changes_nothing_that_was_there():
    """An interrupt between two steps of adding would leave half of a group."""
    before = Moments.none(2, device=torch.device("cpu"))
    after = before.add(slice(None), torch.ones(2, 3))
    assert before.n.tolist() == [0, 0]
    assert after.n.tolist() == [3, 3]
