import numpy as np
import pytest
import torch

from hooklens.errors import HookNameError
from hooklens.patching import Cell, SiteError, grid
from hooklens.patching.runs.sites import Place, lay_out
from tests.annotations import unchecked
from tests.model.networks import make_model


@pytest.fixture(scope="module")
def model():
    return make_model("grouped")


def axes(model, site, lengths=(5,)):
    return {name: list(labels) for name, labels in lay_out(site, model, lengths).axes.items()}


def test_axes_of_grids(model):
    assert axes(model, "resid_pre") == {"layer": [0, 1], "pos": [0, 1, 2, 3, 4]}
    assert axes(model, "z") == {"layer": [0, 1], "head": [0, 1, 2, 3]}
    assert axes(model, grid("v", positions=[-1, 0])) == {"layer": [0, 1], "pos": [4, 0], "head": [0, 1]}
    assert axes(model, grid("z", layers=-1, heads=[2], positions="each"))["layer"] == [1]
    assert axes(model, "hook_embed") == {"pos": [0, 1, 2, 3, 4]}
    assert axes(model, grid("pattern", heads="all", sources=[0, -1])) == {"layer": [0, 1], "source": [0, 4]}
    cells = lay_out(grid("pattern", positions="each", sources="each"), model, (3,)).cells
    assert len(cells) == 2 * 3 * 4 * 3
    assert str(cells[5]) == "blocks.0.attn.hook_pattern, pos 0, head 1, source 2"


def test_several_grids_stand_one_after_another(model):
    array = lay_out(["resid_pre", grid("z", layers=1)], model, (2,))
    assert list(array.axes) == ["cell"]
    assert array.axes["cell"][-1] == "blocks.1.attn.hook_z, head 3"
    assert len(array.cells) == 4 + 4


def test_prompts_of_different_length(model):
    assert axes(model, grid("resid_pre", positions=[-1, 2]), (5, 3)) == {"layer": [0, 1], "pos": [-1, 2]}
    with pytest.raises(SiteError, match=r"'each' needs prompts of one length, found \[3, 5\]"):
        lay_out("resid_pre", model, (5, 3))
    with pytest.raises(SiteError, match=r"positions: \[3\] out of range; there are 3"):
        lay_out(grid("resid_pre", positions=3), model, (5, 3))


@pytest.mark.parametrize(
    "span", [[1, 3], (1, 3), range(1, 4, 2), np.array([1, 3]), torch.tensor([1, 3]), [np.int64(1), 3], slice(1, 4, 2)]
)
def test_numbers_of_any_kind_are_positions_heads_and_sources(model, span):
    """Ranges were lists by luck; numpy's integers, arrays and tensors failed or were compared entry by entry."""
    with unchecked():
        assert axes(model, grid("pattern", positions=span, heads=span, sources=span)) == {
            "layer": [0, 1],
            "pos": [1, 3],
            "head": [1, 3],
            "source": [1, 3],
        }
        assert axes(model, grid("z", layers=np.int64(-1), heads=torch.tensor(2))) == {"layer": [1], "head": [2]}


def test_a_cell_is_resolved_in_each_prompt():
    cell = Cell(name="blocks.0.attn.hook_pattern", layer=0, pos=-1, head=2, source=-3)
    assert [cell.resolve(length) for length in (5, 3)] == [Place(4, 2, 2), Place(2, 2, 0)]
    assert Cell(name="blocks.0.attn.hook_z", layer=0).resolve(3) == Place(None, None, None)
    with pytest.raises(SiteError, match="pos -1, head 2, source -3: source: -3 out of range; there are 2 tokens"):
        cell.resolve(2)


@pytest.mark.parametrize(
    ("site", "match"),
    [
        (lambda: grid("resid_pre", layers=[0, 2, -3]), r"layers: \[2, -3\] out of range; there are 2 layers, 0"),
        (lambda: grid("resid_pre", layers="all"), "layers cannot be patched all at once"),
        (lambda: grid("resid_pre", heads=1), "heads=1, but its axes are"),
        (lambda: grid("k", heads=2), r"heads: \[2\] out of range; there are 2"),
        (lambda: grid("z", sources="each"), "only attention scores and patterns have key positions"),
        (lambda: grid("resid_pre", positions=[1, -4]), r"names \[1\] more than once"),
        (lambda: grid("resid_pre", positions=True), "positions=True"),
        (lambda: grid("resid_pre", positions=[True, False]), "is a mask"),
        (lambda: grid("resid_pre", layers=False), "layers=False"),
        (lambda: grid("z", heads=True), "heads=True"),
        (lambda: grid("z", heads=None), "heads is None"),
        (lambda: grid("pattern", sources=1.0), r"sources=1\.0"),
        (lambda: grid("resid_pre", positions=slice(7, 9)), "names none of the 5 tokens"),
        (lambda: grid("hook_embed", layers=0), "stands in no layer, so layers=0"),
        (lambda: grid("resid_pre", positions=[]), "is empty"),
        (lambda: grid("resid_pre", positions="none"), "'none'; expected 'each', 'all'"),
        (lambda: grid("blocks.0.*"), "name one"),
        ([], "an empty list"),
        ([3], "got .'int'."),
    ],
)
def test_refusals(model, site, match):
    with unchecked(), pytest.raises(SiteError, match=match):
        lay_out(site() if callable(site) else site, model, (5,))


def test_unknown_names_are_suggested(model):
    with pytest.raises(HookNameError, match="Did you mean 'resid_pre'"):
        lay_out("resid_pree", model, (5,))
