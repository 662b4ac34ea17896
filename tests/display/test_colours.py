import re

import pytest

from hooklens.display import diverging, sequential
from hooklens.display.colours import MOST_OPAQUE


def opacity(style):
    return float(re.fullmatch(r"background:rgb\(var\(--hl-\w+\)/([\d.]+)\)", style)[1])


@pytest.mark.parametrize(("value", "share"), [(0.0, 0.0), (1.0, 0.25), (-2.0, 0.5), (4.0, 1.0), (9.0, 1.0)])
def test_opacity_is_the_share_of_the_largest(value, share):
    # Opacities are written in three significant digits.
    assert opacity(diverging(value, 4.0)) == pytest.approx(MOST_OPAQUE * share, abs=0.00051)
    assert ("orange" in diverging(value, 4.0)) == (value < 0)
    # An amount below 0 is none.
    assert opacity(sequential(value, 4.0)) == pytest.approx(MOST_OPAQUE * (share if value >= 0 else 0), abs=0.00051)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_hatched(value):
    assert "repeating-linear-gradient" in diverging(value, 1.0)
    assert "repeating-linear-gradient" in sequential(value, 1.0)


def test_nothing_but_zeros_has_no_colour():
    assert opacity(diverging(0.0, 0.0)) == 0.0
