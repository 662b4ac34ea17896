import pytest
import torch

from hooklens.patching.results.scale import find_small_differences


def test_small_is_below_a_twentieth_of_the_root_mean_square():
    differences = torch.tensor([1.0, -1.0, 0.04, -0.03, 0.06])
    spread = float(differences.double().square().mean().sqrt())
    found = find_small_differences(differences)
    assert found == pytest.approx({3: 0.03 / spread})
    assert list(find_small_differences(torch.tensor([1.0, 0.0]))) == [1]


def test_without_a_spread_nothing_is_small():
    assert find_small_differences(torch.zeros(3)) == {}
    assert find_small_differences(torch.tensor([1e-9])) == {}
    assert find_small_differences(torch.full((2,), torch.nan)) == {}
