"""What holds for every display: it renders without complaint, alone, in light and dark, readable, with words in it."""

from io import BytesIO
from pathlib import Path

import matplotlib.image
import pytest

from tests.browser.pages import NAMES, PAGES, page_of

CONTRAST = (Path(__file__).parent / "contrast.js").read_text(encoding="utf-8")
# WCAG 2.2, level AA, for ordinary text.
LEAST_CONTRAST = 4.5
GROUNDS = {"light": (255, 255, 255), "dark": (18, 18, 18)}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_drawn_and_readable(open_page, name):
    """In light and in dark the page is not empty and its text stands out; `open_page` checks for complaints."""
    page = open_page(page_of(name))
    for scheme, ground in GROUNDS.items():
        page.emulate_media(color_scheme=scheme)
        picture = (matplotlib.image.imread(BytesIO(page.screenshot()), format="png")[..., :3] * 255).round()
        assert tuple(picture[2, 2]) == ground
        # A line of text alone has a few thousand.
        assert (picture != ground).any(-1).sum() > 1000
        contrasts = page.evaluate(CONTRAST)
        assert contrasts, "no text at all"
        assert [found for found in contrasts if found[0] < LEAST_CONTRAST] == [], scheme
    # Nothing stands out of the page, the display has a name, and what takes the keyboard has one, too.
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator(".hooklens").get_attribute("aria-label")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll(".hooklens [tabindex='0'], .hooklens button, .hooklens select")]
        .filter((node) => !(node.getAttribute("aria-label") || node.textContent.trim() || node.closest("label")))
        .map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    # A token that ends a script and begins another is text.
    assert page.evaluate("window.broken === undefined")


def test_contrast_is_measured(open_page):
    """The measure gives the ratios that are known of pairs of colours, through grounds that are partly transparent."""
    page = open_page(
        "<!DOCTYPE html><body style='background:#fff'><div class='hooklens'>"
        "<p style='color:#000'>black</p><p style='color:#777'>grey</p>"
        "<div style='background:rgba(0,0,0,.5)'><p style='color:#fff'>white</p></div></div></body>"
    )
    found = {text: ratio for ratio, text in page.evaluate(CONTRAST)}
    # #777 is the well-known grey that just misses 4.5; half of black over white is #808080, or 127.5 unrounded.
    assert found == {
        "black": pytest.approx(21),
        "grey": pytest.approx(4.48, abs=0.01),
        "white": pytest.approx(3.98, abs=0.01),
    }


@pytest.mark.parametrize("name", NAMES)
def test_two_of_a_kind_are_set_up_on_one_page(open_page, name):
    """A script of one must not touch the other, nor run twice on one (notebooks run scripts again)."""
    fragment = dict(PAGES)[name]()
    page = open_page(f"<!DOCTYPE html><body>{fragment}{fragment}</body>")
    roots = page.locator(".hooklens")
    assert roots.count() == 2
    if roots.nth(0).get_attribute("data-view") and "<script>" in fragment:
        assert [roots.nth(place).get_attribute("data-ready") for place in (0, 1)] == ["", ""]
    ids = page.evaluate("() => [...document.querySelectorAll('.hooklens [id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids))
