import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hooklens.viz.patterns.code import ALPHABET, PatternCode


def decode(text, width):
    """Independent of the writer: digits of base 92, the root of the value in parts of the largest code."""
    letters = [chr(code) for code in range(32, 127) if chr(code) not in ('"', "\\", "<")]
    assert len(letters) == 92
    largest = 92**width - 2
    values = []
    for start in range(0, len(text), width):
        code = 0
        for letter in text[start : start + width]:
            code = 92 * code + letters.index(letter)
        values.append(float("nan") if code == largest + 1 else (code / largest) ** 2)
    return torch.tensor(values, dtype=torch.float64)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30), st.sampled_from([1, 2]))
def test_values_are_read_within_the_stated_rounding(values, width):
    code = PatternCode(width)
    true = torch.tensor(values)
    read = decode(code.write(true), width)
    assert len(read) == len(values)
    errors = (read - true.double()).abs()
    # The stated error is half a step of the root; float64 adds its own.
    assert float(errors.max()) <= code.largest_error() + 1e-12
    small = errors[true <= 0.1]
    assert small.numel() == 0 or float(small.max()) <= code.largest_error(0.1) + 1e-12


@pytest.mark.parametrize("width", [1, 2])
def test_ends_and_what_is_no_number(width):
    code = PatternCode(width)
    values = torch.tensor([0.0, 1.0, torch.nan, 1.0004, -0.0002])
    read = decode(code.write(values), width)
    torch.testing.assert_close(
        read, torch.tensor([0.0, 1.0, torch.nan, 1.0, 0.0], dtype=torch.float64), rtol=0, atol=0, equal_nan=True
    )
    assert code.largest_error() == pytest.approx({1: 0.0111, 2: 0.000118}[width], rel=0.01)


def test_no_character_ends_a_script_or_a_text():
    assert not set(ALPHABET) & set('"\\<')
    assert len(set(ALPHABET)) == 92
