import pytest

from hooklens import viz

TOKENS = ["The", " cat", "\n", "<b>", " שלום"]
VALUES = {"surprisal": [float("nan"), 4.0, 2.0, 0.5, 0.0], "direction": [-1.0, 0.25, 2.0, -2.0, 0.0]}
OTHERS = [None, {" dog": 0.5, "<i>": 0.25}, None, None, None]
HTML = viz.tokens(TOKENS, VALUES, alternatives=OTHERS)._repr_html_()


def opacities(page):
    """Of each token's ground."""
    return page.evaluate(
        """() => [...document.querySelectorAll(".hl-token")].map((token) => {
        const parts = getComputedStyle(token).backgroundColor.match(/[\\d.]+/g); return Number(parts[3] ?? 1); })"""
    )


def test_a_token_tells_its_value_and_what_could_stand_there(open_page):
    page = open_page(HTML)
    told = page.locator(".hl-readout")
    page.locator(".hl-token").nth(1).hover()
    assert told.text_content() == "1 ·cat: surprisal 4"
    assert page.locator(".hl-alternatives span").all_text_contents() == ["·dog 0.5", "<i> 0.25"]
    page.locator(".hl-token").first.focus()
    assert told.text_content() == "0 The: surprisal no value"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert told.text_content() == "3 <b>: surprisal 0.5"
    assert page.locator(".hl-alternatives span").count() == 0


def test_another_row_of_values_colours_the_text(open_page):
    """Opacity is the share of the largest value of the row, up to 0.75; the hue is the sign."""
    page = open_page(HTML)
    assert opacities(page)[1:] == pytest.approx([0.75, 0.375, 0.75 / 8, 0.0], abs=0.005)
    page.locator("select").select_option("1")
    assert opacities(page) == pytest.approx([0.375, 0.75 / 8, 0.75, 0.75, 0.0], abs=0.005)
    hues = page.evaluate(
        """() => [...document.querySelectorAll(".hl-token")].map((token) =>
        getComputedStyle(token).backgroundColor.match(/\\d+/g).slice(0, 3).join())"""
    )
    assert hues[:4] == ["200,80,20", "33,102,172", "33,102,172", "200,80,20"]
    assert page.locator(".hl-scale span").all_text_contents() == ["-2", "2"]
    page.locator(".hl-token").nth(2).hover()
    assert page.locator(".hl-readout").text_content() == "2 ↵: direction 2"


def test_the_text_reads_as_it_is(open_page):
    """Spaces stay spaces when the text is copied, and a line break begins a line."""
    page = open_page(HTML)
    tokens = page.locator(".hl-token")
    assert tokens.nth(1).text_content() == " cat"
    assert tokens.nth(3).text_content() == "<b>"
    assert tokens.nth(2).locator("br").count() == 1
