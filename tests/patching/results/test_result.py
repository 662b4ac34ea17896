import math

import pytest
import torch

from hooklens import patching
from hooklens.errors import CheckpointError, HookLensError
from hooklens.patching import LogitDiff, SweepResult
from hooklens.patching.results.result import SweepStats
from tests.annotations import unchecked
from tests.model.networks import make_model, random_tokens


@pytest.fixture(scope="module")
def result():
    model = make_model("rotary")
    clean, corrupted = random_tokens(2, 4), random_tokens(2, 4, seed=9)
    grid = patching.grid("z", positions="each")
    return patching.sweep(model, clean, corrupted, grid, LogitDiff(3, 5), progress=False)


def test_values_and_scale(result):
    assert result.values.shape == (2, 4, 4)
    assert list(result.axes) == ["layer", "pos", "head"]
    torch.testing.assert_close(result.values, result.per_pair.mean(-1))
    torch.testing.assert_close(
        result.normalized, (result.values - result.corrupted) / (result.clean - result.corrupted)
    )


def test_table_and_top(result):
    table = result.to_dataframe()
    assert list(table.columns) == ["site", "layer", "pos", "head", "value", "normalized"]
    row = table[(table.layer == 1) & (table.pos == 2) & (table["head"] == 3)].iloc[0]
    assert row.value == float(result.values[1, 2, 3])
    assert row.site == "blocks.1.attn.hook_z"
    top = result.top(3)
    distance = (top.value - result.corrupted).abs().tolist()
    assert distance == sorted(distance, reverse=True)
    assert distance[0] == pytest.approx(float((result.values - result.corrupted).abs().max()))


def test_noise_is_scaled_from_the_clean_run():
    model = make_model("rotary")
    clean, corrupted = random_tokens(1, 4), random_tokens(1, 4, seed=9)
    whole = patching.grid("resid_pre", positions="all", layers=1)
    result = patching.sweep(model, clean, corrupted, whole, LogitDiff(3, 5), direction="noise", progress=False)
    assert float(result.normalized) == pytest.approx(1.0)
    assert float(result.values) == pytest.approx(result.corrupted)


def test_save_and_load(result, tmp_path):
    result.save(tmp_path / "sweep.safetensors")
    loaded = SweepResult.load(tmp_path / "sweep.safetensors")
    assert torch.equal(loaded.per_pair, result.per_pair)
    assert (loaded.axes, loaded.cells, loaded.stats) == (result.axes, result.cells, result.stats)
    assert (loaded.clean, loaded.corrupted) == (result.clean, result.corrupted)
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="cannot read a sweep"):
        SweepResult.load(tmp_path / "broken")


def test_no_scale_between_equal_runs():
    model = make_model("rotary")
    clean = random_tokens(1, 4)
    result = patching.sweep(model, clean, clean, "resid_pre", LogitDiff(3, 5), progress=False)
    assert "normalized" not in result.to_dataframe()
    with pytest.raises(HookLensError, match="no scale between them"):
        _ = result.normalized


def test_plots(result):
    figure = result.plot()
    # One panel per layer, positions down, heads across.
    assert len(figure.data) == 2
    assert math.isclose(figure.data[1].z[2][3], float(result.normalized[1, 2, 3]))
    drawn = result.plot(backend="matplotlib")
    assert drawn.axes[0].images[0].get_array().shape == (4, 4)
    with unchecked(), pytest.raises(HookLensError, match="backend is 'ascii'"):
        result.plot(backend="ascii")


def make_result(axes, *, corrupted=0.0, direction="denoise"):
    """A result whose normalized values are 0, 1, 2, ... in the order of the flattened axes."""
    shape = [len(labels) for labels in axes.values()]
    count = math.prod(shape)
    return SweepResult(
        per_pair=torch.arange(float(count)).reshape(*shape, 1),
        axes=axes,
        clean_per_pair=torch.ones(1),
        corrupted_per_pair=torch.full((1,), corrupted),
        cells=tuple({"site": "x"} for _ in range(count)),
        metric="m",
        direction=direction,
        stats=SweepStats(cells=count, pairs=1, unchanged=0, forwards=1, tokens=1.0, naive_forwards=1, naive_tokens=1),
    )


@pytest.mark.parametrize(
    ("axes", "panels", "titles"),
    [
        ({}, [[[0]]], [""]),
        ({"pos": (0, 1, 2)}, [[[0, 1, 2]]], [""]),
        ({"layer": (0, 2), "pos": (0, 1, 2)}, [[[0, 1, 2], [3, 4, 5]]], [""]),
        (
            {"site": ("q", "k"), "layer": (0, 2), "pos": (0, 1, 2)},
            [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]],
            ["site q", "site k"],
        ),
        (
            {"site": ("q", "k"), "head": (1, 3), "layer": (2,), "pos": (0, 1)},
            [[[0, 1]], [[2, 3]], [[4, 5]], [[6, 7]]],
            ["site q head 1", "site q head 3", "site k head 1", "site k head 3"],
        ),
    ],
    ids=["no axis", "one", "two", "three", "four"],
)
def test_plots_of_any_number_of_axes(axes, panels, titles):
    """The last two axes are rows and columns, those before them panels; a missing axis has no name and one entry."""
    result = make_result(axes)
    names = ["", "", *axes]
    by_plotly = result.plot()
    assert [[list(row) for row in panel.z] for panel in by_plotly.data] == panels
    assert (by_plotly.layout.yaxis.title.text, by_plotly.layout.xaxis.title.text) == (names[-2], names[-1])
    by_matplotlib = result.plot(backend="matplotlib")
    drawn = by_matplotlib.axes[:-1]
    assert [axes.images[0].get_array().tolist() for axes in drawn] == panels
    assert [axes.get_title() for axes in drawn] == titles
    entries = [[""], [""], *([str(label) for label in labels] for labels in axes.values())]
    assert [label.get_text() for label in drawn[-1].get_yticklabels()] == entries[-2]
    assert [label.get_text() for label in drawn[-1].get_xticklabels()] == entries[-1]


def test_plots_say_what_their_scale_is():
    axes = {"layer": (0, 1), "pos": (0, 1)}
    title = "m: 0 as in the {} run, 1 as in the {} run"
    assert make_result(axes).plot().layout.title.text == title.format("corrupted", "clean")
    noise = make_result(axes, direction="noise").plot()
    assert noise.layout.title.text == title.format("clean", "corrupted")
    assert [list(row) for row in noise.data[0].z] == [[1.0, 0.0], [-1.0, -2.0]]
    # Without a scale the values themselves are drawn.
    same = make_result(axes, corrupted=1.0).plot()
    assert same.layout.title.text == "m"
    assert [list(row) for row in same.data[0].z] == [[0.0, 1.0], [2.0, 3.0]]
    assert make_result(axes).plot(title="mine").layout.title.text == "mine"


def test_plots_write_labels_at_the_numbers_they_belong_to():
    """Numbers count into the labels, from the end where they are negative; names are taken in order."""
    result = make_result({"site": ("q", "k"), "pos": (2, -1, 0)})
    figure = result.plot(labels={"pos": ["a", "b", "c", "d"], "site": ["queries", "keys"]})
    assert list(figure.layout.xaxis.ticktext) == ["c", "d", "a"]
    assert list(figure.layout.yaxis.ticktext) == ["queries", "keys"]
    with pytest.raises(HookLensError, match=r"2 labels for axis 'pos' have none for \[2\]"):
        result.plot(labels={"pos": ["a", "b"]})
    with pytest.raises(HookLensError, match=r"1 labels for axis 'site' have none for \[1\]"):
        result.plot(labels={"site": ["queries"]})
    far = make_result({"pos": (-3, 0)})
    with pytest.raises(HookLensError, match=r"2 labels for axis 'pos' have none for \[-3\]"):
        far.plot(labels={"pos": ["a", "b"]})


def test_plots_write_the_labels_they_are_given(result):
    tokens = ["When", "Mary", "Mary", "→ John"]
    drawn = result.plot(backend="matplotlib", labels={"pos": tokens, "head": ["a", "b", "c", "d"]})
    assert [label.get_text() for label in drawn.axes[0].get_yticklabels()] == tokens
    assert [label.get_text() for label in drawn.axes[1].get_xticklabels()] == ["a", "b", "c", "d"]
    assert list(result.plot(labels={"pos": tokens}).layout.yaxis.ticktext) == tokens
    titles = [title.text for title in result.plot(labels={"layer": ["first", "second"]}).layout.annotations]
    assert titles == ["layer first", "layer second"]
    with pytest.raises(
        HookLensError, match=r"labels are given for \['query'\]; the axes are \['layer', 'pos', 'head'\]"
    ):
        result.plot(labels={"query": tokens})
    with pytest.raises(HookLensError, match=r"3 labels for axis 'pos' have none for \[3\]"):
        result.plot(labels={"pos": tokens[:3]})


def test_the_display_shows_the_cells_of_top(result):
    """A result printed all its tensors, 63 lines for 60 cells."""
    # Of cells that change nothing none comes before another.
    rows, top = result._summary().listing.rows[:8], result.top(8)
    assert [float(row[-2]) for row in rows] == pytest.approx(top["value"].tolist())
    assert [float(row[-1]) for row in rows] == pytest.approx(top["normalized"].tolist())
    assert [list(row[:-2]) for row in rows] == top[["site", "layer", "pos", "head"]].astype(str).to_numpy().tolist()
    assert 'data-view="grid"' in result._repr_html_()
