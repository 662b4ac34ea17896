"""Elements: whatever a text holds, it is text."""

import json
from html import unescape
from html.parser import HTMLParser
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from hooklens.display import element, fragment, render
from hooklens.display.elements import UNWRITABLE, data
from hooklens.display.page import document


class Texts(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.attributes: dict[str, str | None] = {}
        self.tags: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes |= dict(attrs)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@given(st.text())
def test_texts_and_attributes_are_read_back(text):
    found = Texts(render(element("p", text, title=text)))
    shown = text.translate(UNWRITABLE)
    assert "".join(found.texts) == shown
    assert found.attributes["title"] == shown
    assert found.tags == ["p"]


@given(st.text())
def test_any_text_can_be_written(text):
    render(element("p", text, element("b"), text)).encode("utf-8")


def test_children_and_attributes():
    made = element(
        "p", "a", None, ["b", element("i", "c"), "d"], "e", class_="x", aria_label=None, open=True, hidden=False
    )
    assert render(made) == '<p class="x" open="">ab<i>c</i>de</p>'


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
def test_data_ends_where_it_should(value):
    """A `</script>` in a token ended the script, and the rest of it stood on the page."""
    written = render(data("hl-data", {"value": value, "hostile": "</script><b>"}))
    assert written.count("</") == 1
    assert json.loads(Texts(written).texts[0])["hostile"] == "</script><b>"


def test_a_fragment_brings_its_styles_and_a_document_is_whole():
    page = fragment(element("p", "<b>"), label='a "label"', kind="grid", script="1;")
    assert page.startswith('<div class="hooklens"')
    assert "aria-label" in page
    assert unescape(Texts(page).attributes["aria-label"] or "") == 'a "label"'
    assert page.count("<script>") == 1
    assert "<b>" not in page
    whole = document("<title>", page)
    assert whole.startswith("<!DOCTYPE html>")
    assert "&lt;title&gt;" in whole
