"""Tests of hooklens.hooks.pos_slice: one reading of positions for captures and caches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import InputError
from hooklens.hooks.pos_slice import read_pos_slice, resolve_positions
from tests.annotations import unchecked


@given(
    n=st.integers(0, 6),
    chosen=st.one_of(st.integers(-8, 8), st.slices(8), st.lists(st.integers(-8, 8), min_size=1, max_size=5)),
)
def test_positions_are_those_of_a_python_list(n, chosen):
    """Indexing a list of numbers is the oracle, for ints, slices and lists alike."""
    numbers = list(range(n))
    forms = [chosen]
    if not isinstance(chosen, slice):
        forms += [torch.tensor(chosen), np.array(chosen), torch.tensor(chosen, dtype=torch.int8)]
    for form in forms:
        with unchecked():
            positions = read_pos_slice(form)
        assert positions == chosen
        try:
            wanted = chosen if isinstance(chosen, slice) else [chosen] if isinstance(chosen, int) else list(chosen)
            expected = numbers[wanted] if isinstance(wanted, slice) else [numbers[position] for position in wanted]
        except IndexError:
            with pytest.raises(InputError, match=rf"pos_slice=.* is out of range: {n} positions are here"):
                resolve_positions(positions, n, where="are here")
        else:
            assert resolve_positions(positions, n, where="are here") == expected


def test_none_is_all():
    assert read_pos_slice(None) is None


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        ((1, 4), r"pos_slice=\(1, 4\) can mean a slice \(in TransformerLens\) or a list; "),
        (torch.tensor([True, False]), r"is a mask, take mask.nonzero\(\)\[:, 0\]; "),
        ([True, False], r"pos_slice=\[True, False\] is a mask"),
        (np.array([True, False]), "is a mask"),
        (True, "pos_slice=True; "),
        ([], r"pos_slice=\[\]; "),
        ([[0, 1]], r"pos_slice=\[\[0, 1\]\]; "),
        ([[0], [1, 2]], "pos_slice="),
        (0.0, "pos_slice=0.0; "),
        (torch.tensor([1.0]), "pos_slice="),
        ([1j], "pos_slice="),
        ("last", "pos_slice='last'; "),
        ({0, 1}, "pos_slice="),
        ([2**80], "pos_slice="),
        (slice(None, None, 0), "pos_slice=slice"),
        (slice(0.5, None), "pos_slice=slice"),
        (object(), "pos_slice=<object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_counts_no_positions_is_refused(found, hint):
    """Captures took a mask for positions 0 and 1, and a tuple for a list."""
    with unchecked(), pytest.raises(InputError, match=f"{hint}.*expected an int, a slice, or a list of at least one"):
        read_pos_slice(found)
