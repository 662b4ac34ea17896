import json
import re

import pytest
import torch

import hooklens as hl
from hooklens import viz
from hooklens.errors import InputError
from tests.annotations import unchecked

LINES = {"a": [1.0, float("nan"), 3.0, 5.0], "<b>": [2.0, 2.0, float("nan"), 2.0]}


def paths(html):
    return [re.findall(r"([ML])([\d.]+) ([\d.]+)", d) for d in re.findall(r' d="([^"]*)"', html)]


def test_lines_are_where_their_values_are():
    html = viz.curves(LINES, [0, 1, 2, 4], x_name="step", y_name="loss")._repr_html_()
    first, second = paths(html)
    # A gap begins the line anew, and the distance of places is that of their numbers.
    assert [letter for letter, _, _ in first] == ["M", "M", "L"]
    x = [float(x) for _, x, _ in first]
    assert (x[2] - x[0]) == pytest.approx(2 * (x[1] - x[0]), abs=0.1)
    y = [float(y) for _, _, y in first]
    assert (y[0] - y[2]) == pytest.approx(2 * (y[0] - y[1]), abs=0.1)
    # 2 is a quarter of the way from 1 to 5.
    assert (y[0] - float(second[0][2])) == pytest.approx((y[0] - y[2]) / 4, abs=0.1)
    data = json.loads(re.search(r'class="hl-data">(.*?)</script>', html)[1])
    assert data["values"] == [[1.0, None, 3.0, 5.0], [2.0, 2.0, None, 2.0]]
    assert data["labels"] == ["step 0.0", "step 1.00", "step 2.00", "step 4.00"]
    assert "&lt;b&gt;" in html


def test_a_logarithmic_axis_has_equal_steps_for_equal_factors():
    (line,) = paths(viz.curves(torch.tensor([1.0, 10.0, 100.0]), y_scale="log")._repr_html_())
    y = [float(y) for _, _, y in line]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.1)
    with pytest.raises(InputError, match="a logarithmic scale has no place for values of 0 and below"):
        viz.curves({"a": [0.0, 1.0]}, y_scale="log")


def test_many_places_are_thinned_out():
    values = torch.randn(3, 10_001)
    view = viz.curves(values)
    html = view._repr_html_()
    assert "3,335 of 10,001 places are drawn" in html
    assert len(html.encode()) < 400_000
    assert len(view.to_dataframe()) == 10_001


def test_tables_and_figures_have_bands():
    view = viz.curves(LINES, ["p", "q", "r", "s"], x_name="at", bands={"a": ([0.0] * 4, [6.0] * 4)}, title="$t$")
    table = view.to_dataframe()
    assert list(table.columns) == ["at", "a", "a low", "a high", "<b>"]
    assert table["at"].tolist() == ["p", "q", "r", "s"]
    assert table["a high"].tolist() == [6.0] * 4
    axes = view.to_matplotlib().axes[0]
    assert [line.get_label() for line in axes.lines] == ["a", "<b>"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["p", "q", "r", "s"]
    assert len(axes.collections) == 1
    figure = view.to_plotly()
    assert [trace.name for trace in figure.data if trace.name] == ["a", "&lt;b>"]
    assert list(figure.layout.xaxis.ticktext) == ["p", "q", "r", "s"]
    assert view.description[1] == "  a: 1.00 to 5.00, lowest 1.00, highest 5.00"


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"the lines have the shapes \[\(1,\), \(2,\)\]; expected one length for all"):
        viz.curves({"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(InputError, match="x has 2 places, and the lines have 4"):
        viz.curves(LINES, [0, 1])
    with pytest.raises(InputError, match="x does not ascend"):
        viz.curves(LINES, [0, 1, 1, 2])
    with pytest.raises(InputError, match="bands are given for 'c'; the lines are 'a', '<b>'"):
        viz.curves(LINES, bands={"c": ([0.0] * 4, [1.0] * 4)})
    with pytest.raises(InputError, match="the bands of 'a' do not have the 4 places"):
        viz.curves(LINES, bands={"a": ([0.0], [1.0])})
    with pytest.raises(InputError, match="y_scale is 'root'"), unchecked():
        viz.curves(LINES, y_scale="root")


@pytest.fixture(scope="module")
def model():
    return hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")


def test_residual_norms_are_those_of_the_stream(model):
    text = "When Mary and John went"
    tokens = model.to_str_tokens(text)
    _, cache = model.run_with_cache(text)
    streams = [cache["resid_pre", layer][0] for layer in range(4)] + [cache["resid_post", 3][0]]
    norms = torch.stack([stream.square().sum(-1).sqrt() for stream in streams], -1).double()
    view = viz.residual_norms(cache)
    assert view.x == ("0_pre", "1_pre", "2_pre", "3_pre", "3_post")
    # Sums of 128 squares in float32, in another order.
    close = {"atol": 0, "rtol": 1e-5}
    torch.testing.assert_close(view.values, torch.stack([norms[0], norms[1:].mean(0)]), **close)
    torch.testing.assert_close(view.bands[view.names[1]], torch.stack([norms[1:].amin(0), norms[1:].amax(0)]), **close)
    chosen = viz.residual_norms(cache, positions=[-1, 2], tokens=tokens)
    assert chosen.names == (f"pos {len(tokens) - 1} {tokens[-1]}", f"pos 2 {tokens[2]}")
    torch.testing.assert_close(chosen.values, norms[[-1, 2]], **close)


def test_residual_norms_leave_padding_out(model):
    _, cache = model.run_with_cache(["When Mary and John went", "When Mary"])
    _, alone = model.run_with_cache("When Mary")
    # Rows in a batch agree with single ones to float32's rounding.
    torch.testing.assert_close(
        viz.residual_norms(cache, row=1).values, viz.residual_norms(alone).values, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(InputError, match="row is 2; the cache has 2 rows"):
        viz.residual_norms(cache, row=2)
    with pytest.raises(InputError, match=r"positions are \[7\]; expected some of 0 to 2"):
        viz.residual_norms(cache, row=1, positions=[7])
    with pytest.raises(InputError, match="holds no resid_pre or resid_post"):
        viz.residual_norms({"blocks.0.attn.hook_z": torch.zeros(1, 2, 3, 4)})
