import torch

from hooklens import viz
from tests.browser.pages import causal

PATTERNS = causal(2, 3, 6, 6)
TOKENS = ["<s>", " Mary", " and", " John", "\n", " Mary"]
HTML = viz.attention(PATTERNS, tokens=TOKENS)._repr_html_()


def told(page):
    return page.locator(".hl-readout").first.text_content()


def opaque(page, canvas):
    """The opacity of each cell that a canvas shows, `[query key]` from 0 to 255."""
    values = page.locator(canvas).first.evaluate(
        """(canvas) => [[canvas.height, canvas.width], [...canvas.getContext("2d")
        .getImageData(0, 0, canvas.width, canvas.height).data].filter((_, place) => place % 4 === 3)]"""
    )
    return torch.tensor(values[1]).reshape(values[0])


def read(text):
    """What is told in front of the last number, or of each of a list of numbers, and the numbers."""
    parts = [part.rsplit(" ", 1) for part in text.split("; ")]
    return [name for name, _ in parts], torch.tensor([float(number) for _, number in parts])


def check_told(page, start, values, labels):
    """The five largest values in order; three decimals of a value that is off by 0.00012."""
    names, numbers = read(told(page))
    order = values.sort(descending=True).indices[: min(5, int((values > 0).sum()))].tolist()
    assert names == [f"{start} {order[0]} {labels[order[0]]}", *(f"{place} {labels[place]}" for place in order[1:])]
    torch.testing.assert_close(numbers, values[order], atol=0.00063, rtol=0)


def check_cell(page, start, value):
    assert told(page).startswith(start + ": ")
    torch.testing.assert_close(read(told(page))[1], value[None], atol=0.00063, rtol=0)


def test_queries_and_keys_tell_where_attention_goes(open_page):
    page = open_page(HTML)
    labels = ["<s>", "·Mary", "·and", "·John", "↵", "·Mary"]
    page.locator(".hl-query").nth(3).hover()
    check_told(page, "query 3 ·John looks at", PATTERNS[0, 0, 3], labels)
    page.locator(".hl-key").nth(1).hover()
    check_told(page, "key 1 ·Mary is looked at by", PATTERNS[0, 0, :, 1], labels)
    # A cell of the field is 24 pixels wide for six tokens.
    page.locator(".hl-field canvas").hover(position={"x": 2.5 * 24, "y": 4.5 * 24})
    check_cell(page, "query 4 ↵ looks at key 2 ·and", PATTERNS[0, 0, 4, 2])
    page.mouse.move(1000, 800)
    assert told(page).startswith("Point at")


def test_a_head_is_chosen_by_mouse_and_by_keyboard(open_page):
    page = open_page(HTML)
    thumbs = page.locator(".hl-thumb")
    assert page.locator(".hl-chosen").text_content() == "layer 0 head 0"
    thumbs.nth(4).click()
    assert page.locator(".hl-chosen").text_content() == "layer 1 head 1"
    # A byte of opacity is the value in parts of 255; the page's values are off by 0.00012.
    torch.testing.assert_close(opaque(page, ".hl-field canvas") / 255, PATTERNS[1, 1], atol=0.0025, rtol=0)
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert page.locator(".hl-chosen").text_content() == "layer 0 head 2"
    assert [thumb.get_attribute("aria-checked") for thumb in thumbs.all()].index("true") == 2
    torch.testing.assert_close(opaque(page, ".hl-field canvas") / 255, PATTERNS[0, 2], atol=0.0025, rtol=0)
    page.locator("select").select_option("0.5")
    torch.testing.assert_close(opaque(page, ".hl-field canvas") / 255, PATTERNS[0, 2].sqrt(), atol=0.0025, rtol=0)


def test_what_the_keyboard_comes_to_stays_told(open_page):
    """The tokens that it had left cleared the line a moment later, under what the cells had written."""
    page = open_page(HTML)
    page.locator(".hl-query").first.focus()
    page.keyboard.press("Tab")
    check_cell(page, "query 0 <s> looks at key 0 <s>", PATTERNS[0, 0, 0, 0])
    page.wait_for_timeout(100)
    check_cell(page, "query 0 <s> looks at key 0 <s>", PATTERNS[0, 0, 0, 0])


def test_tokens_and_cells_are_reached_by_keyboard(open_page):
    page = open_page(HTML)
    page.locator(".hl-thumb").first.focus()
    for key in ("Tab", "Tab", "End"):
        page.keyboard.press(key)
    assert told(page).startswith("key 5 ·Mary is looked at by 5 ·Mary")
    for key in ("Tab", "ArrowDown"):
        page.keyboard.press(key)
    assert told(page).startswith("query 1 ·Mary looks at")
    for key in ("Tab", "ArrowDown", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    check_cell(page, "query 2 ·and looks at key 1 ·Mary", PATTERNS[0, 0, 2, 1])


def test_colours_follow_the_theme(open_page):
    page = open_page(HTML)
    ink = """(canvas) => [...canvas.getContext("2d").getImageData(0, 0, 1, 1).data].slice(0, 3)"""
    field = page.locator(".hl-field canvas")
    assert field.evaluate(ink) == [0x21, 0x66, 0xAC]
    page.emulate_media(color_scheme="dark")
    assert field.evaluate(ink) == [0x6B, 0xAE, 0xE6]
    page.evaluate("document.body.dataset.jpThemeLight = 'true'")
    page.wait_for_function(
        "getComputedStyle(document.querySelector('.hooklens')).getPropertyValue('--hl-for') === '#2166ac'"
    )
    assert field.evaluate(ink) == [0x21, 0x66, 0xAC]


def test_values_of_one_character_are_read(open_page):
    """Twelve layers of twelve heads over 64 tokens are written with one character for each value."""
    patterns = causal(12, 12, 64, 64)
    page = open_page(viz.attention(patterns, tokens=[f" t{place}" for place in range(64)])._repr_html_())
    page.locator(".hl-thumb").nth(143).click()
    # The view says 0.011 of its values; a byte of opacity adds half of 1/255.
    torch.testing.assert_close(opaque(page, ".hl-field canvas") / 255, patterns[11, 11], atol=0.0133, rtol=0)


def test_two_views_choose_heads_by_themselves(open_page):
    page = open_page(HTML + HTML)
    page.locator(".hooklens").nth(1).locator(".hl-thumb").nth(2).click()
    assert page.locator(".hl-chosen").all_text_contents() == ["layer 0 head 0", "layer 0 head 2"]
