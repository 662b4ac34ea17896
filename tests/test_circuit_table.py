import pytest

from tests.circuit_table import LEARNED, METHODS, MODELS, NORMS, measure, measure_known, read_known, read_page
from tests.slow_cases import slow_but

# Sums in another order move a curve by rounding, which can exchange edges of nearly equal scores.
AWAY = 0.02


def check(row) -> None:
    """The floors: near the network, and far from chance."""
    assert row.cpr > 0.88
    assert row.cmd < 0.08
    assert max(row.random_cpr) < 0.6
    assert min(row.random_cmd) > 0.4
    assert (row.cpr, row.cmd) == pytest.approx(read_page()[row.model, row.method, row.rules], abs=AWAY)


@pytest.mark.parametrize("name", slow_but(MODELS, ["tiny-llama", "tiny-falcon"]))
def test_circuits_of_the_bundled_models(name):
    for row in measure(name, [("eap", "norms"), ("eap-ig-inputs", "gradient")]):
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_all_rows(name):
    for row in measure(name, (*METHODS, LEARNED)):
        check(row)


def check_known(areas, norms=NORMS) -> None:
    by_chance = [found for name, found in areas.items() if "random" in name]
    assert all(area < 0.7 for found in by_chance for area in found)
    assert [set(found) for name, found in areas.items() if "ACDC" in name] == [{1.0}]
    assert min(max(found) for found in zip(*(areas[name] for name in areas if "edge" in name), strict=True)) >= 0.95
    columns = [NORMS.index(norm) for norm in norms]
    page = {name: tuple(found[column] for column in columns) for name, found in read_known().items()}
    assert all(page[name] == pytest.approx(found, abs=AWAY) for name, found in areas.items())


def test_the_known_circuit_is_found():
    """Gates, which take hundreds of steps, with one norm only."""
    whole = measure_known(["layer"])
    check_known(whole, ["layer"])
    assert list(whole) == list(read_known())
    check_known(measure_known([None, "rms"], learn=False), [None, "rms"])


@pytest.mark.slow
def test_the_known_circuit_is_found_by_all_ways_for_each_norm():
    areas = measure_known()
    check_known(areas)
    assert list(areas) == list(read_known())


def test_the_page_has_a_row_for_every_model_and_method():
    assert list(read_page()) == [(name, *way) for name in MODELS for way in (*METHODS, LEARNED)]
