"""top_tokens against topk of the dense matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.weights.factored import FactoredMatrix
from hooklens.weights.top_tokens import top_tokens
from tests.annotations import unchecked


@given(st.data(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 12))
def test_entries_are_those_of_the_dense_matrix(data, n_rows, n_columns, block):
    k = data.draw(st.integers(1, n_rows * n_columns))
    seed = data.draw(st.integers(0, 1000))
    generator = torch.Generator().manual_seed(seed)
    matrix = FactoredMatrix(
        torch.randn(n_rows, 2, generator=generator, dtype=torch.float64),
        torch.randn(2, n_columns, generator=generator, dtype=torch.float64),
    )
    dense = matrix.AB
    for given_matrix in (matrix, dense):
        values, rows, columns = top_tokens(given_matrix, k, block=block)
        torch.testing.assert_close(values, dense.flatten().topk(k).values, rtol=0, atol=1e-14)
        # A block is multiplied out on its own and may sum in another order.
        torch.testing.assert_close(dense[rows, columns], values, rtol=0, atol=1e-14)
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == k


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 1000))
def test_ties_give_distinct_entries(k, block, seed):
    dense = torch.randint(0, 3, (6, 5), generator=torch.Generator().manual_seed(seed)).float()
    values, rows, columns = top_tokens(dense, k, block=block)
    assert torch.equal(values, dense.flatten().topk(k).values)
    assert torch.equal(dense[rows, columns], values)
    assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == k


def test_the_default_block_covers_a_matrix_larger_than_one_block():
    """2^13 x 2^13 entries are four blocks of 2^24."""
    u, v = torch.randn(2**13, dtype=torch.float64), torch.rand(2**13, dtype=torch.float64)
    found = top_tokens(FactoredMatrix(u[:, None], v[None, :]), 1)
    assert (found.rows.item(), found.columns.item()) == (u.argmax().item(), v.argmax().item())


def test_errors_say_what_was_found():
    with pytest.raises(InputError, match=r"shape \(2, 3, 3\); expected one matrix"):
        top_tokens(FactoredMatrix(torch.zeros(2, 3, 1), torch.zeros(2, 1, 3)), 1)
    with pytest.raises(InputError, match=r"k=10; expected 1 to 9"):
        top_tokens(torch.zeros(3, 3), 10)
    for k in (True, 2.0, None, "2"):
        with unchecked(), pytest.raises(InputError, match=r"k=.*; expected a number of entries"):
            top_tokens(torch.zeros(3, 3), k)
    with pytest.raises(InputError, match=r"block=0; expected at least one row"):
        top_tokens(torch.zeros(3, 3), 1, block=0)
