import json
import re

import pytest
import torch

from hooklens import viz
from hooklens.viz.patterns.view import summarize
from tests.browser.pages import NASTY, causal, words
from tests.viz.patterns.test_code import decode


def written(html):
    return json.loads(re.search(r'<script type="application/json" class="hl-data">(.*?)</script>', html)[1])


def test_twelve_layers_of_twelve_heads_stay_below_400_kilobytes():
    """Labels as long as they get, of letters that take three bytes each."""
    patterns = causal(12, 12, 64, 64)
    html = viz.attention(patterns, tokens=["\N{HIRAGANA LETTER A}" * 20] * 64)._repr_html_()
    assert len(html.encode()) < 400_000
    data = written(html)
    assert data["width"] == 1
    places = torch.ones(64, 64).tril().bool()
    for head in (0, 77, 143):
        read = decode(data["patterns"][head], 1)
        assert float((read - patterns.flatten(0, 1)[head][places].double()).abs().max()) <= 0.0112
    assert "by at most 0.011, and by at most 0.0035 where they are below 0.1" in html


def test_few_heads_are_written_more_exactly():
    patterns = causal(2, 3, 5, 9)
    data = written(viz.attention(patterns)._repr_html_())
    assert data["width"] == 2
    assert data["lengths"] == [5, 6, 7, 8, 9]
    held = torch.arange(9) < torch.tensor(data["lengths"])[:, None]
    for text, pattern in zip(data["patterns"], patterns.flatten(0, 1), strict=True):
        assert float((decode(text, 2) - pattern[held].double()).abs().max()) <= 0.00012


def test_what_is_left_out_is_said():
    html = viz.attention(causal(9, 300, 300))._repr_html_()
    assert len(html.encode()) < 400_000
    assert "Of 300 queries and 300 keys these are shown: queries 0 to 255 and keys 0 to 255" in html
    assert "heads are left out; name some with layer= or heads=" not in html
    assert "6 of 15 heads are left out" in viz.attention(causal(15, 256, 256))._repr_html_()


def test_labels_are_text():
    html = viz.attention(causal(1, 12, 12), tokens=words(12))._repr_html_()
    assert "</script><script>window" not in html
    assert "&lt;b&gt;" in html
    for hidden in ("\0", NASTY[8], "\ud83d"):
        assert hidden not in html
    html.encode("utf-8")


def test_summaries_are_means_over_queries():
    pattern = torch.tensor([[[1.0, 0.0, 0.0], [0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]])
    view = viz.attention(pattern)
    entropy = -(2 * 0.25 * torch.tensor(0.25).log() + 0.5 * torch.tensor(0.5).log())
    entropy = (entropy - 0.25 * torch.tensor(0.25).log() - 0.75 * torch.tensor(0.75).log()) / 3
    expected = torch.tensor([[1.75 / 3, (0.25 + 0.25) / 2, 2.0 / 3, float(entropy)]])
    torch.testing.assert_close(summarize(view.patterns), expected)
    assert view.description == [
        "1 heads, 3 queries x 3 keys",
        "  head 0: first 0.583, before 0.250, itself 0.667, entropy 0.534",
    ]
    assert len(repr(viz.attention(causal(30, 4, 4))).splitlines()) == 20


def test_the_table_has_what_may_be_looked_at():
    patterns = causal(2, 3, 4, 4)
    table = viz.attention(patterns, layer=[5, 8], tokens=["a", "b", "c", "d"]).to_dataframe()
    assert len(table) == 2 * 3 * 10
    assert list(table.columns) == ["layer", "head", "query", "key", "query_token", "key_token", "attention"]
    line = table.query("layer == 8 and head == 1 and query == 3 and key == 2")
    assert line.attention.item() == pytest.approx(float(patterns[1, 1, 3, 2]))
    assert (line.query_token.item(), line.key_token.item()) == ("d", "c")
    assert "layer" not in viz.attention(patterns[0]).to_dataframe()


def test_pictures(tmp_path):
    few = viz.attention(causal(2, 5, 5), tokens=["$a$", "<b>", " c", "d", "e"]).to_matplotlib()
    assert [axes.get_title() for axes in few.axes[:2]] == ["head 0", "head 1"]
    assert [label.get_text() for label in few.axes[0].get_yticklabels()] == [r"\$a\$", "<b>", "·c", "d", "e"]
    patterns = causal(2, 3, 5, 5)
    sheet = viz.attention(patterns).to_matplotlib().axes[0].images[0].get_array()
    # Two rows and three columns of five cells, with gaps of one.
    assert sheet.shape == (11, 17)
    torch.testing.assert_close(torch.from_numpy(sheet.filled(0.0))[6:11, 6:11], patterns[1, 1])
    viz.attention(patterns).save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    viz.attention(patterns).save(tmp_path / "a.html")
    assert (tmp_path / "a.html").read_text().startswith("<!DOCTYPE html>")
