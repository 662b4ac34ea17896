import pytest

from hooklens.errors import InputError
from hooklens.patching import MIB_FRACTIONS, circuit_model_distance, circuit_performance_ratio, mib_sizes


def test_sizes_are_those_of_the_published_code():
    """`int(fraction * edges)`, also where the product is a little below a whole number."""
    assert mib_sizes(32491) == (32, 64, 162, 324, 649, 1624, 3249, 6498, 16245, 32491)
    assert mib_sizes(82) == (0, 0, 0, 0, 1, 4, 8, 16, 41, 82)
    with pytest.raises(InputError, match="mib_sizes: n_edges is 0"):
        mib_sizes(0)


def test_areas_by_hand():
    # Trapezoids of a curve that jumps from 0 to 1 between the fractions 0.1 and 0.2, and is 1.5 at 0.5.
    kept = [0.0] * 7 + [1.0, 1.5, 1.0]
    under = 0.1 * 0.5 + 0.3 * 1.25 + 0.5 * 1.25
    away = 0.099 * 1.0 + 0.1 * 0.5 + 0.3 * 0.25 + 0.5 * 0.25
    assert circuit_performance_ratio(kept) == pytest.approx(under)
    assert circuit_model_distance(kept) == pytest.approx(away)
    assert circuit_performance_ratio([1.0] * 10) == pytest.approx(0.999)
    assert circuit_model_distance([1.0] * 10) == 0.0
    assert circuit_performance_ratio([0.0, 1.0], fractions=[0.0, 0.5]) == 0.25


def test_curves_of_other_sizes_are_refused():
    with pytest.raises(InputError, match="circuit_performance_ratio: 2 circuits with the fractions"):
        circuit_performance_ratio([0.0, 1.0])
    with pytest.raises(InputError, match="two or more fractions that rise"):
        circuit_model_distance([0.0, 1.0], fractions=[0.5, 0.5])
    assert len(MIB_FRACTIONS) == 10
