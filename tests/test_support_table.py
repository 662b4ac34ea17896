from hooklens.adapters.families import load_families
from tests.support_table import PAGE, make_page, variants_of


def test_the_page_is_what_the_families_and_their_tests_say() -> None:
    assert PAGE.read_text(encoding="utf-8") == make_page(), "run `python -m tests.support_table`"


def test_every_family_is_tried_on_variants() -> None:
    assert all(variants_of(family) for family in load_families())
