from hooklens import viz

HTML = viz.curves({"a": [1.0, 2.0, 4.0], "b": [3.0, float("nan"), 5.0]}, [0, 10, 40], x_name="step")._repr_html_()


def test_places_are_told_by_mouse_and_by_keyboard(open_page):
    page = open_page(HTML)
    told, plot = page.locator(".hl-readout"), page.locator(".hl-plot")
    # The middle of the axis is at 20, closer to 10 than to 40.
    plot.hover(position={"x": 393, "y": 100})
    assert told.text_content() == "step 10.0: a 2; b no value"
    assert page.locator(".hl-guide").evaluate("(line) => getComputedStyle(line).visibility") == "visible"
    page.mouse.move(1000, 800)
    assert told.text_content().startswith("Point at")
    plot.focus()
    page.keyboard.press("End")
    assert told.text_content() == "step 40.0: a 4; b 5"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert told.text_content() == "step 0.0: a 1; b 3"


def test_the_legend_hides_lines(open_page):
    page = open_page(HTML)
    button, line = page.locator(".hl-legend button").first, page.locator(".hl-plot [data-line='0']")
    button.hover()
    assert page.locator(".hl-plot [data-line='1']").evaluate("(line) => line.classList.contains('hl-pale')")
    button.focus()
    page.keyboard.press("Enter")
    assert button.get_attribute("aria-pressed") == "false"
    assert not line.is_visible()
    page.locator(".hl-plot").focus()
    assert page.locator(".hl-readout").text_content() == "step 0.0: b 3"
    button.click()
    assert line.is_visible()
