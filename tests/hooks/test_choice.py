"""Tests of hooklens.hooks.choice: one reading of positions, heads and rows, against indexing a Python list."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.errors import EditError, InputError
from hooklens.hooks.choice import read_choice, resolve_choice
from tests.annotations import unchecked

_listed = st.lists(st.integers(-8, 8), min_size=1, max_size=5, unique=True)


def forms_of(chosen):
    """All ways of writing one choice, and what they are read as."""
    if isinstance(chosen, slice):
        ends = (chosen.start, chosen.stop, chosen.step)
        yield chosen
        yield slice(*(None if end is None else np.int64(end) for end in ends))
        yield slice(*(None if end is None else torch.tensor(end) for end in ends))
        return
    yield from (chosen, torch.tensor(chosen), torch.tensor(chosen, dtype=torch.int8), np.array(chosen))
    if isinstance(chosen, int):
        yield from (np.int64(chosen), np.int8(chosen))
        return
    yield from (tuple(chosen), [np.int64(one) for one in chosen], [torch.tensor(one) for one in chosen])
    yield np.array(chosen)[::-1][::-1]


@given(n=st.integers(0, 6), chosen=st.one_of(st.integers(-8, 8), st.slices(8), _listed))
def test_entries_are_those_of_a_python_list(n, chosen):
    """Indexing a list of numbers is the oracle, for ints, slices and lists alike."""
    numbers = list(range(n))
    for form in forms_of(chosen):
        with unchecked():
            index = read_choice(form, what="pos_slice")
        assert index == (tuple(chosen) if isinstance(chosen, list) else chosen)
        plain = (index.start, index.stop, index.step) if isinstance(index, slice) else np.atleast_1d(index).tolist()
        assert all(end is None or type(end) is int for end in plain)
        try:
            wanted = chosen if isinstance(chosen, slice) else [chosen] if isinstance(chosen, int) else list(chosen)
            expected = numbers[wanted] if isinstance(wanted, slice) else [numbers[position] for position in wanted]
        except IndexError:
            with pytest.raises(InputError, match=rf"pos_slice: .* out of range; there are {n} positions here, 0 to"):
                resolve_choice(index, n, what="pos_slice", noun="positions here")
            continue
        if len(set(expected)) < len(expected):
            with pytest.raises(InputError, match=r"names \[.*\] more than once; name each entry once"):
                resolve_choice(index, n, what="pos_slice", noun="positions here")
        else:
            assert resolve_choice(index, n, what="pos_slice", noun="positions here") == expected


@given(start=st.integers(-6, 6), stop=st.integers(-6, 6), step=st.sampled_from([-2, -1, 1, 2]))
def test_a_range_is_the_list_of_its_numbers(start, stop, step):
    numbers = range(start, stop, step)
    if numbers:
        assert read_choice(numbers, what="pos") == tuple(numbers)
    else:
        with pytest.raises(InputError, match=r"pos=range\(.*\) is empty; expected an int, a slice"):
            read_choice(numbers, what="pos")


@pytest.mark.parametrize("n", [0, 4])
def test_none_is_all(n):
    assert read_choice(None, what="head") is None
    assert resolve_choice(None, n, what="head", noun="heads") == list(range(n))


@pytest.mark.parametrize("form", [lambda numbers: numbers, torch.tensor, np.array, tuple])
def test_an_entry_named_twice_is_refused(form):
    """One of two values for one entry won without a word."""
    with unchecked(), pytest.raises(InputError, match=r"head: .* names \[1\] more than once; name each entry once"):
        read_choice(form([1, 0, 1]), what="head")
    # 3 and -1 are one entry only where there are four.
    index = read_choice([3, -1], what="head")
    assert resolve_choice(index, 5, what="head", noun="heads") == [3, 4]
    with pytest.raises(InputError, match=r"names \[3\] more than once"):
        resolve_choice(index, 4, what="head", noun="heads")


def test_a_tuple_is_a_list_but_where_it_can_mean_a_range():
    assert read_choice((1, 4), what="head") == (1, 4)
    with pytest.raises(
        InputError, match=r"pos_slice=\(1, 4\) can mean a slice \(as in TransformerLens\) or a list; exp"
    ):
        read_choice((1, 4), what="pos_slice", refuse_tuple=True)


def test_the_callers_error_and_hint():
    with (
        unchecked(),
        pytest.raises(EditError, match=r"edit Zero\('z'\): head='0'; expected an int, a slice, or a list"),
    ):
        read_choice("0", what="edit Zero('z'): head", error=EditError)
    with pytest.raises(EditError, match=r"head: 4 out of range; there are 4 heads, 0 to 3; look elsewhere$"):
        resolve_choice(4, 4, what="head", noun="heads", hint="; look elsewhere", error=EditError)
    with pytest.raises(EditError, match=r"head: \[4, -5\] out of range; there are 4 heads, 0 to 3$"):
        resolve_choice((1, 4, -5), 4, what="head", noun="heads", error=EditError)


@pytest.mark.parametrize(
    ("found", "hint"),
    [
        (torch.tensor([True, False]), r"is a mask; give the numbers of its entries, mask.nonzero\(\)\[:, 0\]; "),
        ([True, False], r"pos_slice=\[True, False\] is a mask"),
        ((True, False), r"pos_slice=\(True, False\) is a mask"),
        ([0, True], "is a mask"),
        ([torch.tensor(True)], "is a mask"),
        ([np.bool_(True)], "is a mask"),
        (np.array([True, False]), "is a mask"),
        (True, "pos_slice=True; "),
        (torch.tensor(True), "pos_slice=True .*; "),
        (np.bool_(False), "pos_slice=.*False.*; "),
        ([], r"pos_slice=\[\] is empty; "),
        ((), r"pos_slice=\(\) is empty; "),
        (torch.tensor([], dtype=torch.long), "is empty; "),
        (np.array([], dtype=int), "is empty; "),
        ([[0, 1]], r"pos_slice=\[\[0, 1\]\]; "),
        ([[0], [1, 2]], "pos_slice="),
        (torch.zeros(2, 2, dtype=torch.long), "pos_slice="),
        (0.0, "pos_slice=0.0; "),
        ([0.0], "pos_slice="),
        (torch.tensor(1.0), "pos_slice="),
        (torch.tensor([1.0]), "pos_slice="),
        (np.float64(1), "pos_slice="),
        ([1j], "pos_slice="),
        ("last", "pos_slice='last'; "),
        (["0"], "pos_slice="),
        (b"0", "pos_slice="),
        ({0, 1}, "pos_slice="),
        ({0: 1}, "pos_slice="),
        (slice(None, None, 0), "pos_slice=slice"),
        (slice(0.5, None), "pos_slice=slice"),
        (slice(True, None), "pos_slice=slice"),
        (slice(None, [1]), "pos_slice=slice"),
        (object(), "pos_slice=<object"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_counts_no_entries_is_refused(found, hint):
    """Captures took a mask for positions 0 and 1, and a tuple for a list."""
    with unchecked(), pytest.raises(InputError, match=f"{hint}.*expected an int, a slice, or a list of at least one"):
        read_choice(found, what="pos_slice")


def test_long_choices_are_shown_shortened():
    with unchecked(), pytest.raises(InputError) as caught:
        read_choice([0.5] * 1000, what="pos")
    assert len(str(caught.value)) < 200
    with unchecked(), pytest.raises(InputError, match=r"pos=Tensor\[1000\] \(torch.float32\); expected"):
        read_choice(torch.zeros(1000), what="pos")


def test_numbers_too_large_for_an_axis_are_out_of_range():
    with pytest.raises(InputError, match=r"out of range; there are 3 tokens"):
        resolve_choice(read_choice([2**80], what="pos"), 3, what="pos", noun="tokens")


def test_entries_may_be_named_twice_where_they_are_copied():
    index = read_choice([1, -1, 1], what="rows", allow_doubles=True)
    assert resolve_choice(index, 2, what="rows", noun="rows", allow_doubles=True) == [1, 1, 1]
    with pytest.raises(InputError, match=r"rows: \(1, -1, 1\) names \[1\] more than once"):
        resolve_choice(index, 2, what="rows", noun="rows")
