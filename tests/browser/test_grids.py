import torch

from hooklens import viz

HTML = viz.grid(torch.arange(6.0).reshape(2, 3) - 2, rows="layer", columns=("pos", ["<b>", "b", "c"]))._repr_html_()


def test_cells_are_told_by_mouse_and_by_keyboard(open_page):
    page = open_page(HTML)
    told, cells = page.locator(".hl-readout"), page.locator("td")
    cells.nth(5).hover()
    assert told.text_content() == "layer 1, pos 2 c: 3.00"
    cells.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert told.text_content() == "layer 1, pos 1 b: 2.00"
    # There is nothing below and nothing further right.
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
        page.keyboard.press(key)
    assert told.text_content() == "layer 1, pos 2 c: 3.00"
    # One cell is in the order of the tab key, the one that was left.
    assert page.evaluate("document.querySelectorAll('td[tabindex=\"0\"]').length") == 1


def test_colours_are_shares_of_the_largest_value(open_page):
    page = open_page(HTML)
    grounds = page.evaluate(
        "() => [...document.querySelectorAll('td')].map((cell) => getComputedStyle(cell).backgroundColor)"
    )
    assert grounds[0] == "rgba(200, 80, 20, 0.5)"  # -2 of 3, in parts of 0.75
    assert grounds[2] == "rgba(33, 102, 172, 0)"
    assert grounds[5] == "rgba(33, 102, 172, 0.75)"
