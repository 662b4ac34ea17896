import re
from html import unescape

import pytest
import torch

from hooklens import viz
from hooklens.errors import InputError
from tests.annotations import unchecked

VALUES = torch.tensor([[1.0, -2.0, float("nan")], [0.25, 0.0, 4.0]])


def test_cells_hold_the_values():
    html = viz.grid(VALUES, rows=("layer", [3, 7]), columns=("pos", ["a", "<b>", "a"]), title="x & y")._repr_html_()
    told = [unescape(label) for label in re.findall(r'<td[^>]* aria-label="([^"]*)"', html)]
    assert told == [
        "layer 3, pos 0 a: 1.00",
        "layer 3, pos 1 <b>: -2.00",
        "layer 3, pos 2 a: nan",
        "layer 7, pos 0 a: 0.250",
        "layer 7, pos 1 <b>: 0.0",
        "layer 7, pos 2 a: 4.00",
    ]
    assert html.count("&lt;b&gt;</span>") == 1
    # A share of the largest value, 4, in parts of the opacity 0.75.
    assert html.count('rgb(var(--hl-blue)/0.75)"') == 1
    assert "rgb(var(--hl-orange)/0.375)" in html
    assert "<h3>x &amp; y</h3>" in html


def test_the_table_has_all_cells_in_order():
    table = viz.grid(VALUES[None].expand(2, 2, 3), rows="layer", columns="pos", panels=["p", "q"]).to_dataframe()
    assert list(table.columns) == ["panel", "layer", "pos", "value"]
    assert table.value.isna().sum() == 2
    assert table.query("panel == 'q' and layer == '1' and pos == '2'").value.item() == 4.0


def test_details_are_told_in_place_of_texts():
    made = viz.grid(VALUES[:1, :2], texts=[["t", "u"]], details=[["more of t", "more of u"]])
    assert made.description[1] == "  row 0, column 1: -2.00 (more of u)"
    html = made._repr_html_()
    assert ">t</td>" in html
    assert "more of t" in html
    assert list(made.to_dataframe().text) == ["t", "u"]


def test_amounts_have_a_scale_from_0():
    made = viz.grid(VALUES.abs(), scale="amount", texts=[["$a$", "b", "c"], ["d", "e", "f"]])
    (axes, _) = made.to_matplotlib().axes
    assert axes.images[0].get_clim() == (0.0, 4.0)
    # Dark cells have white letters, and dollars are no formula.
    letters = {text.get_text(): text.get_color() for text in axes.texts}
    assert letters["f"] == "white"
    assert letters["e"] == "black"
    made.to_matplotlib().canvas.draw()
    assert made.to_plotly().layout.coloraxis.cmin == 0.0
    assert viz.grid(VALUES).to_plotly().layout.coloraxis.cmid == 0.0


def test_many_cells_are_left_out_and_said_to_be():
    html = viz.grid(torch.zeros(3, 50, 70))._repr_html_()
    assert "2 of 3 panels are left out" in html
    assert html.count("<td") == 3500
    assert "70 x 70 cells are more than the 4,000 that are shown" in viz.grid(torch.zeros(70, 70))._repr_html_()
    assert len(repr(viz.grid(torch.randn(50, 50))).splitlines()) <= 20


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"grid: values have the shape \[3\]; expected \[row column\]"), unchecked():
        viz.grid(torch.zeros(3))
    with pytest.raises(InputError, match="grid: 1 labels are given for rows, and the values have 2"):
        viz.grid(VALUES, rows=("layer", ["0"]))
    with pytest.raises(InputError, match=r"grid: texts have the sizes \[1, 1, 2\], and the values have \[1, 2, 3\]"):
        viz.grid(VALUES, texts=[["a", "b"]])
    with pytest.raises(InputError, match=r"grid: details have the sizes"):
        viz.grid(VALUES, details=[["a", "b"]])
    with pytest.raises(InputError, match="scale is 'log'"), unchecked():
        viz.grid(VALUES, scale="log")
    with (
        pytest.raises(InputError, match=r"heads: values have the shape \[2, 3, 1\]; expected \[layer head\]"),
        unchecked(),
    ):
        viz.heads(VALUES[..., None])


def test_heads_are_layers_by_heads():
    table = viz.heads(torch.arange(6.0).reshape(2, 3), layers=[4, 9]).to_dataframe()
    assert table.query("layer == '9' and head == '2'").value.item() == 5.0
