import math

import pandas as pd
import pytest

from hooklens.errors import HookLensError, InputError
from hooklens.pool.comparing.compare import compare_models
from tests.annotations import unchecked
from tests.model.networks import make_config, make_model, random_tokens


@pytest.fixture(scope="module")
def result():
    models = {name: make_model("grouped", seed=seed) for seed, name in enumerate("abc")}
    return compare_models(models, random_tokens(3, 6), progress=False)


def test_the_table_is_a_copy(result):
    table = result.to_dataframe()
    pd.testing.assert_frame_equal(table, result.frame)
    table["cka"] = 0.0
    assert (result.frame["cka"] != 0).all()
    assert list(table.columns) == [
        "first", "second", "site", "layer", "cosine", "relative_norm", "kl", "cka", "weight_relative_norm",
        "weight_cosine",
    ]  # fmt: skip


def test_a_line_for_each_pair_and_a_panel_for_each_measure(result):
    figure = result.plot()
    assert len(figure.data) == 2 * 6
    drawn = {(trace.name, trace.xaxis): list(trace.y) for trace in figure.data}
    own = result.frame[result.frame["second"] == "c"]
    assert drawn["a - c", "x"] == own["cosine"].tolist()
    assert drawn["a - c", "x3"] == own["kl"].tolist()
    assert figure.layout.xaxis.title.text == "layer (resid_post)"
    assert figure.layout.title.text == "a, b, c"
    # One entry of the legend for the lines of all panels.
    assert [trace.name for trace in figure.data if trace.showlegend] == ["a - b", "a - c"]

    (panel,) = result.plot(["cka"], backend="matplotlib", title="t").axes
    assert panel.get_title() == "linear CKA, debiased"
    assert [line.get_label() for line in panel.lines] == ["a - b", "a - c"]
    assert list(panel.lines[1].get_ydata()) == own["cka"].tolist()


def test_measures_without_any_value_are_not_drawn():
    models = {"narrow": make_model("learned, tied"), "wide": make_model(make_config(d_model=20))}
    result = compare_models(models, random_tokens(3, 6), progress=False)
    titles = [title.text for title in result.plot().layout.annotations]
    assert titles == ["KL of the logit lens (nats)", "linear CKA, debiased"]


def test_weights_by_kind_and_layer(result):
    figure = result.plot_weights(backend="matplotlib")
    first, second, _ = figure.axes
    assert (first.get_title(), second.get_title()) == ("a - b", "a - c")
    kinds = [label.get_text() for label in first.get_yticklabels()]
    assert "attn.W_Q" in kinds
    table = result.weights
    cell = table[(table["second"] == "c") & (table["weight"] == "blocks.1.attn.W_Q")]["relative_norm"].item()
    assert second.images[0].get_array()[kinds.index("attn.W_Q"), 1] == cell
    assert not math.isnan(cell)
    assert result.plot_weights("cosine").layout.title.text == "cosine of the weights: a, b, c"


def test_points_that_are_not_one_for_each_layer_are_named():
    models = {"a": make_model("grouped"), "b": make_model("grouped", seed=1)}
    result = compare_models(models, random_tokens(3, 6), site="blocks.*.hook_*_out", progress=False)
    axis = result.plot().layout.xaxis
    assert axis.title.text == "hook point"
    assert list(axis.ticktext) == list(result.frame["site"])


def test_what_is_not_there_is_refused(result):
    with pytest.raises(InputError, match=r"measures are \['ckaa'\]; this comparison has \['cosine'"):
        result.plot(["ckaa"])
    with pytest.raises(InputError, match="measure is 'cka'; expected 'relative_norm' or 'cosine'"):
        result.plot_weights("cka")
    models = {"a": make_model("grouped"), "b": make_model("grouped", seed=1)}
    without = compare_models(models, random_tokens(2, 5), weights=False, progress=False)
    assert without.weights is None
    assert "weight_cosine" not in without.frame
    with pytest.raises(InputError, match="weights were not compared"):
        without.plot_weights()
    with unchecked(), pytest.raises(HookLensError, match="backend"):
        result.plot(backend="svg")
