"""The largest entries of many tensors, against sorting all of them."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.weights.merging.trimming import find_trim

# Repeated numbers, numbers whose leading bits are alike, the smallest and the largest there are.
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.0 + 2**-52, -1.0 - 2**-52, 5e-324, 1.7e308, float("inf")]),
    st.floats(-3, 3, allow_nan=False),
)


@given(st.lists(st.lists(NUMBERS, max_size=6), min_size=1, max_size=4), st.floats(0, 1))
def test_just_the_largest_entries_stay_and_the_first_of_equal_ones(rows, density):
    tensors = [torch.tensor(row, dtype=torch.float64) for row in rows]
    whole = torch.cat(tensors)
    n_kept = int(density * len(whole))
    order = sorted(range(len(whole)), key=lambda i: (-abs(float(whole[i])), i))
    expected = torch.zeros(len(whole), dtype=torch.bool)
    expected[order[:n_kept]] = True
    trim = find_trim(lambda: tensors, n_kept)
    assert torch.equal(torch.cat([trim.keep(tensor) for tensor in tensors]), expected)


def test_what_does_not_stay_is_zero():
    tensor = torch.tensor([[0.5, -2.0], [1.0, -0.5]], dtype=torch.float64)
    trimmed = find_trim(lambda: [tensor.T], 2)(tensor.T)
    assert trimmed.tolist() == [[0.0, 1.0], [-2.0, 0.0]]
