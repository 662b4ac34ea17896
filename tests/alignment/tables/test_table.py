"""The table, as a value."""

import pytest
import torch

from hooklens.alignment import AlignmentError, AlignmentTable, Basis, search
from hooklens.errors import CheckpointError
from tests.alignment.tables.test_search import ONE, PAIRS


def make_table(**changes) -> AlignmentTable:
    margins = torch.tensor([[[1.0, -1.0, 1.0, 1.0], [-1.0, -2.0, 0.0, -1.0]], [[2.0, 3.0, 4.0, 5.0], [torch.nan] * 4]])
    name = "blocks.{}.hook_resid_pre"
    bases = {
        (3, 0): {"a": Basis(name.format(3), torch.eye(4)[:2], "das", {"seed": 1}), "b": Basis("x", torch.eye(4)[3:])}
    }
    fields = {
        "method": "das",
        "site": "resid_pre",
        "variables": ("a", "b"),
        "layers": (3, 5),
        "positions": (0, 7),
        "margins": margins,
        "unpatched_margins": torch.tensor([-1.0, -1.0, 1.0, -1.0]),
        "training_accuracy": torch.tensor([[0.5, 1.0], [1.0, torch.nan]], dtype=torch.float64),
        "bases": bases,
    }
    if "margins" in changes and changes["margins"].shape[:2] != (2, 2):
        fields["training_accuracy"] = torch.full(changes["margins"].shape[:2], torch.nan, dtype=torch.float64)
    return AlignmentTable(**{**fields, **changes})


def make_whole() -> AlignmentTable:
    return make_table(controls={"placebo": make_table(method="random"), "full": make_table(method="full", bases={})})


def test_accuracy_and_margin():
    table = make_table()
    torch.testing.assert_close(
        table.accuracy, torch.tensor([[0.75, 0.0], [1.0, torch.nan]]).double(), equal_nan=True, rtol=0, atol=0
    )
    torch.testing.assert_close(table.margin[0], torch.tensor([0.5, -1.0]))
    assert table.unpatched_accuracy == 0.25
    assert table.best() == (5, 0)
    assert table.n_dims == {(3, 0): {"a": 2, "b": 1}}
    # 1, 0, 1, 1 have a variance of 1/4 with n - 1.
    assert float(table.standard_errors[0, 0]) == pytest.approx(0.25)


def test_of_equally_accurate_cells_the_best_has_the_larger_margin():
    margins = torch.tensor([[[1.0], [2.0]], [[-1.0], [1.5]]])
    assert make_table(margins=margins, unpatched_margins=torch.tensor([0.0])).best() == (3, 7)
    with pytest.raises(AlignmentError, match="no cell was measured"):
        make_table(margins=torch.full((2, 2, 4), torch.nan)).best()


def test_rows_of_the_data_frame():
    table = make_whole().to_dataframe()
    assert len(table) == 12
    assert table["table"].unique().tolist() == ["das", "placebo", "full"]
    first = table.iloc[0]
    assert (first["layer"], first["pos"], first["accuracy"], first["margin"]) == (3, 0, 0.75, 0.5)
    assert (first["training_accuracy"], first["n_dims"]) == (0.5, 3)
    assert table["accuracy"].isna().sum() == 3
    assert table[table["table"] == "full"]["n_dims"].isna().all()


def test_figures_stand_beside_each_other():
    table = make_whole()
    figure = table.plot()
    assert [trace.type for trace in figure.data] == ["heatmap"] * 3
    assert list(figure.data[0].z[0]) == [0.75, 0.0]
    assert len(table.plot(backend="matplotlib").axes) == 4


def test_the_text_shows_the_best_cells_and_what_controls_have():
    lines = repr(make_whole()).splitlines()
    assert lines[:4] == [
        "AlignmentTable: das of 'a', 'b' at 'resid_pre'",
        "  cells                            2 layers x 2 positions",
        "  held-out rows                    4",
        "  accuracy without an interchange  0.250",
    ]
    assert lines[4].split() == ["layer", "pos", "accuracy", "placebo", "full"]
    assert lines[5].split() == ["5", "0", "1.00", "1.00", "1.00"]
    many = make_table(layers=tuple(range(40)), positions=(0,), margins=torch.ones(40, 1, 4))
    assert len(repr(many).splitlines()) <= 20


@pytest.mark.parametrize("made", ["by hand", "by a search"])
def test_a_file_holds_all(tmp_path, made):
    table = make_whole()
    if made == "by a search":
        table = search(PAIRS.model, ONE, method="mean_differences", controls=["placebo", "full"], progress=False)
    table.save(tmp_path / "table.safetensors")
    read = AlignmentTable.load(tmp_path / "table.safetensors")
    assert list(read.controls) == list(table.controls)
    for one, other in zip([table, *table.controls.values()], [read, *read.controls.values()], strict=True):
        for word in ("method", "site", "variables", "layers", "positions"):
            assert getattr(one, word) == getattr(other, word)
        for word in ("margins", "unpatched_margins", "training_accuracy"):
            torch.testing.assert_close(getattr(one, word), getattr(other, word), equal_nan=True, rtol=0, atol=0)
        assert {cell: dict(bases) for cell, bases in one.bases.items()} == {
            cell: dict(bases) for cell, bases in other.bases.items()
        }


def test_a_file_of_another_kind_is_refused(tmp_path):
    Basis("x", torch.eye(2)).save(tmp_path / "basis.safetensors")
    with pytest.raises(CheckpointError, match="does not hold an alignment table"):
        AlignmentTable.load(tmp_path / "basis.safetensors")


def test_statistics_are_over_rows():
    table = make_table(margins=torch.ones(1, 1, 4), layers=(3,), positions=(0,))
    assert float(table.standard_errors) == 0.0
    p_values = table.permutation_test()
    # 1, 1, 1, 1 against 0, 0, 1, 0: of 8 assignments of three differences two are as extreme.
    assert float(p_values) == pytest.approx(2 / 8)
