import json
import re

import pytest
import torch

from hooklens import viz
from hooklens.errors import InputError
from tests.annotations import unchecked
from tests.browser.pages import NASTY

TOKENS = ["The", " cat", "\n", "<b>"]


def test_values_and_alternatives_are_in_the_page():
    rows = {"a": torch.tensor([float("nan"), 1.23456, 2.0, 0.5]), "b": [-1.0, 0.0, 4.0, 2.0]}
    view = viz.tokens(TOKENS, rows, alternatives=[None, {" dog": 0.5}, [("<i>", 0.25)], None], title="t")
    html = view._repr_html_()
    data = json.loads(re.search(r'class="hl-data">(.*?)</script>', html)[1])
    assert data["values"] == [[None, 1.235, 2.0, 0.5], [-1.0, 0.0, 4.0, 2.0]]
    assert data["largest"] == [2.0, 4.0]
    # Each row of values has a scale of its own.
    assert data["signed"] == [False, True]
    assert data["alternatives"] == [[], [["·dog", 0.5]], [["<i>", 0.25]], []]
    assert html.count('class="hl-token"') == 4
    assert "background:rgb(var(--hl-blue)/0.188)" in html
    assert view.description == [
        "4 tokens",
        "  a: 2 ↵ 2.00, 1 ·cat 1.23, 3 <b> 0.500, 0 The nan",
        "  b: 2 ↵ 4.00, 3 <b> 2.00, 0 The -1.00, 1 ·cat 0.0",
    ]


def test_the_table_has_a_column_for_each_row_of_values():
    table = viz.tokens(TOKENS, torch.arange(8.0).reshape(2, 4), names=["a", "b"]).to_dataframe()
    assert list(table.columns) == ["pos", "token", "a", "b"]
    assert table.token.tolist() == TOKENS
    assert table.b.tolist() == [4.0, 5.0, 6.0, 7.0]
    others = viz.tokens(["x"], [1.0], alternatives=[{"y": 0.5}]).to_dataframe()
    assert others.alternatives[0] == (("y", 0.5),)
    assert others["value"].tolist() == [1.0]


def test_long_texts_are_cut_and_said_to_be():
    html = viz.tokens(["x"] * 5_010, torch.zeros(5_010))._repr_html_()
    assert "the last 10 of 5,010 tokens are left out" in html
    assert html.count('class="hl-token"') == 5_000


def test_tokens_are_text(tmp_path):
    view = viz.tokens(NASTY, list(range(len(NASTY))))
    html = view._repr_html_()
    assert "<script>window" not in html
    html.encode("utf-8")
    viz.tokens(["$x$", " y", "\n", "z" * 200], [1.0, -1.0, 0.0, 2.0]).save(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_places_text_in_lines():
    figure = viz.tokens(["a" * 60, " b" * 20, "\n", "c"], [1.0, 2.0, 0.0, float("nan")], title="t").to_matplotlib()
    axes = figure.axes[0]
    placed = {text.get_text()[0]: text.get_position() for text in axes.texts}
    # The second token does not fit into the rest of 90 letters; the line break ends its line.
    assert placed == {"a": (0, 0.5), "·": (0, 1.5), "↵": (40, 1.5), "c": (0, 2.5)}
    # The largest value has three quarters of the colour, no value has none.
    assert sorted(round(patch.get_facecolor()[3], 4) for patch in axes.patches) == [0.0, 0.375, 0.75]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"there are 4 tokens, and values have the shape \[3\]; expected one for each"):
        viz.tokens(TOKENS, [1.0, 2.0, 3.0])
    with pytest.raises(InputError, match="alternatives are given for 1 tokens, and there are 4"):
        viz.tokens(TOKENS, [0.0] * 4, alternatives=[None])
    with pytest.raises(InputError, match="names go with a tensor"):
        viz.tokens(TOKENS, {"a": [0.0] * 4}, names=["b"])
    with pytest.raises(InputError, match="found no tokens"):
        viz.tokens([], torch.zeros(0))
    with pytest.raises(InputError, match="no values are called 'c'"):
        viz.tokens(TOKENS, {"a": [0.0] * 4}).to_matplotlib("c")
    with pytest.raises(InputError, match="scale is 'x'"), unchecked():
        viz.tokens(TOKENS, [0.0] * 4, scale="x")


def test_alternatives_that_read_alike_are_all_kept():
    """Of two ids with one text the second took the first one's place."""
    view = viz.tokens(["x"], [1.0], alternatives=[[("a", 0.5), ("a", 0.25)]])
    assert view.alternatives == ((("a", 0.5), ("a", 0.25)),)
