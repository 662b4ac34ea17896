"""The forms of a report."""

from html.parser import HTMLParser

import pytest

import hooklens as hl
from hooklens.analysis import Report, report
from hooklens.analysis.first_report.drawing import format_cell
from hooklens.errors import CheckpointError
from tests.model.networks import make_config, make_model, random_tokens

PROMPT = "When Mary and John went to the store , John gave a drink to"


@pytest.fixture(scope="module")
def found() -> Report:
    return report(hl.HookedCausalLM.from_pretrained("bundled:tiny-llama"), PROMPT)


class Page(HTMLParser):
    """Opens and closes in order; keeps texts, and what a page would have to fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.fetched = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def test_the_text_has_all_sentences_and_calls_within_60_lines(found):
    text = str(found)
    assert len(text.splitlines()) <= 60
    for one in found.findings:
        assert f">>> {one.code}" in text
        assert one.title in text
        for sentence in one.sentences:
            assert sentence in text


def test_a_deep_model_has_as_short_a_text():
    model = make_model(make_config(n_layers=40, n_heads=2))
    found = report(model, random_tokens(1, 8))
    assert len(str(found).splitlines()) <= 60
    lines = [line.split()[0] for line in str(found).splitlines() if "_pre" in line and line.startswith("   ")]
    assert lines == ["0_pre", "10_pre", "20_pre", "30_pre"]
    assert len(found["lens"]) == 41


def test_the_page_is_one_file(found, tmp_path):
    found.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not page.fetched
    assert "url(" not in text
    assert "color-scheme:light dark" in text
    shown = "".join(page.texts)
    for one in found.findings:
        assert one.code in shown
        assert all(sentence in shown for sentence in one.sentences)
    assert not Page(found._repr_html_()).open
    with pytest.raises(CheckpointError, match="cannot write a report to"):
        found.save(tmp_path)


def test_bars_are_as_long_as_their_values(found):
    """The largest fills its half, and what speaks against stands on the other side."""
    html = found._repr_html_()
    section = html[html.index("Which heads? ") : html.index("From which tokens")]
    values = found["heads"].value
    shown = next(one for one in found.findings if one.name == "heads").shown
    assert shown.component.tolist()[-2:] == ["remainder", "bias"]
    largest = values.abs().max()
    for value in shown.value:
        width = 50 * abs(value) / largest
        left = 50 - width if value < 0 else 50
        assert f'style="left:{left:.1f}%;width:{width:.1f}%"' in section


def test_all_bars_of_a_table_are_on_one_scale(found):
    """Small scores of one kind were drawn as long as large ones of another."""
    html = found._repr_html_()
    section = html[html.index("Which heads are of a known kind") :]
    shown = next(one for one in found.findings if one.name == "kinds").shown
    kinds = ["previous_token", "duplicate_token", "induction"]
    for score in shown[kinds].to_numpy().flatten():
        assert f'style="left:0.0%;width:{100 * score / shown[kinds].max().max():.1f}%"' in section


def test_prompts_are_text_not_markup():
    model = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
    found = report(model, [[0, 5, 9]])
    page = found._repr_html_()
    assert "<|endoftext|>" not in page
    assert "&lt;|endoftext|&gt;" in page


def test_one_line_for_each_sentence(found):
    table = found.to_dataframe()
    assert table.columns.tolist() == ["finding", "sentence", "code"]
    assert len(table) == sum(len(one.sentences) for one in found.findings)
    assert len(repr(found).splitlines()) == 1 + len(table) <= 20


def test_numbers():
    assert [format_cell(cell) for cell in (0.0, -0.0001, 0.25, -0.25, 1e-5, 3, "a", (1.0, "b"))] == [
        "0.000", "-1.0e-04", "0.250", "-0.250", "1.0e-05", "3", "a", "1.000 b",
    ]  # fmt: skip
