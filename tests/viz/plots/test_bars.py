import re

import pandas as pd
import pytest
import torch

from hooklens import viz
from hooklens.errors import InputError


def bars_of(html):
    """Left end and width of each bar, in parts of the track."""
    return [(float(left), float(width)) for left, width in re.findall(r"left:([\d.]+)%;width:([\d.]+)%", html)]


def test_the_furthest_from_0_have_bars_and_the_others_one():
    view = viz.bars(["a", "b", "c", "d"], [1.0, -4.0, 2.0, 0.5], k=2)
    assert view.shown == [("b", -4.0), ("c", 2.0), ("the other 2", 1.5)]
    html = view._repr_html_()
    # From -4 to 2: 0 is at two thirds.
    expected = [(0.0, 200 / 3), (200 / 3, 100 / 3), (200 / 3, 25.0)]
    assert [part for bar in bars_of(html) for part in bar] == pytest.approx(
        [part for bar in expected for part in bar], abs=0.01
    )
    assert "The 2 values closest to 0 are one bar" in html
    assert view.to_dataframe()["value"].tolist() == [1.0, -4.0, 2.0, 0.5]


def test_one_value_that_would_be_left_out_has_a_bar():
    assert viz.bars({"a": 1.0, "b": 2.0, "c": 3.0}, k=2).shown == [("c", 3.0), ("b", 2.0), ("a", 1.0)]


def test_tables_of_attribution():
    """Rows are averaged, and what is no component stands below: the sum over bars is the logit."""
    table = pd.DataFrame(
        {
            "component": ["L0H0", "L0H1", "remainder", "bias"] * 2,
            "row": [0] * 4 + [1] * 4,
            "value": [1.0, 2.0, 30.0, 0.5, 3.0, -2.0, 10.0, 0.5],
        }
    )
    view = viz.bars(table, title="logit")
    assert view.shown == [("L0H0", 2.0), ("L0H1", 0.0), ("remainder", 20.0), ("bias", 0.5)]
    assert view.title == "logit (mean over 2 rows)"
    assert viz.bars(table, row=1).shown[0] == ("L0H0", 3.0)
    with pytest.raises(InputError, match=r"bars: the table has no row 2; it has \[0, 1\]"):
        viz.bars(table, row=2)
    with pytest.raises(InputError, match=r"the table has the columns \['component', 'row'\]"):
        viz.bars(table.drop(columns="value"))


def test_figures():
    view = viz.bars([" $a$", "<b>", "c"], torch.tensor([1.0, -3.0, float("nan")]))
    axes = view.to_matplotlib().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["<b>", r"·\$a\$", "c"]
    assert [patch.get_width() for patch in axes.patches[:2]] == [-3.0, 1.0]
    figure = view.to_plotly()
    assert list(figure.data[0].x[:2]) == [-3.0, 1.0]
    assert list(figure.layout.yaxis.ticktext) == ["&lt;b>", "·$a$", "c"]
    assert "&lt;b&gt;" in view._repr_html_()


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match="names have no values"):
        viz.bars(["a"])
    with pytest.raises(InputError, match="2 labels are given for values, and the values have 1"):
        viz.bars(["a", "b"], [1.0])
    with pytest.raises(InputError, match="values are given beside a table or a mapping"):
        viz.bars({"a": 1.0}, [1.0])
    with pytest.raises(InputError, match="row goes with a table"):
        viz.bars(["a"], [1.0], row=0)
    with pytest.raises(InputError, match=r"values have the shape \[0\]; expected one axis, not empty"):
        viz.bars([], [])
    with pytest.raises(InputError, match=r"bars: k.*>= 1"):
        viz.bars(["a"], [1.0], k=0)
