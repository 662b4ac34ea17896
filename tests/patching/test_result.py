import math

import pytest
import torch

from hooklens import patching
from hooklens.errors import CheckpointError, HookLensError
from hooklens.patching import LogitDiff, SweepResult
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
