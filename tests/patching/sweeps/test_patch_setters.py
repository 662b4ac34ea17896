import pytest
import torch

from hooklens import patching
from hooklens.errors import InputError

CASES = [
    ("layer_pos_patch_setter", (3, 1), (2, 4, 5), lambda activation: activation[:, 1]),
    ("layer_pos_patch_setter", (3, -1), (2, 4, 3, 5), lambda activation: activation[:, 3]),
    ("layer_pos_head_vector_patch_setter", (3, 1, 2), (2, 4, 3, 5), lambda activation: activation[:, 1, 2]),
    ("layer_head_vector_patch_setter", (3, 2), (2, 4, 3, 5), lambda activation: activation[:, :, 2]),
    ("layer_head_pattern_patch_setter", (3, 2), (2, 3, 4, 4), lambda activation: activation[:, 2]),
    ("layer_head_pos_pattern_patch_setter", (3, 2, 1), (2, 3, 4, 4), lambda activation: activation[:, 2, 1]),
    (
        "layer_head_dest_src_pos_pattern_patch_setter",
        (3, 2, 1, 0),
        (2, 3, 4, 4),
        lambda activation: activation[:, 2, 1, 0],
    ),
]


@pytest.mark.parametrize(("name", "index", "shape", "entries"), CASES)
def test_sets_the_entries_of_an_index_in_place_and_no_others(name, index, shape, entries):
    corrupted, clean = torch.zeros(shape), torch.rand(shape) + 1
    patched = getattr(patching, name)(corrupted, list(index), clean)
    assert patched is corrupted
    torch.testing.assert_close(entries(patched), entries(clean), rtol=0, atol=0)
    assert (patched != 0).sum() == entries(clean).numel()


@pytest.mark.parametrize(("name", "index", "shape", "entries"), CASES)
def test_refuses_an_index_of_another_length(name, index, shape, entries):
    del entries
    with pytest.raises(InputError, match=rf"{len(index) + 1} numbers; expected {len(index)}: layer"):
        getattr(patching, name)(torch.zeros(shape), [*index, 0], torch.zeros(shape))


def test_a_clean_run_may_be_longer():
    corrupted, clean = torch.zeros(1, 2, 3), torch.ones(1, 5, 3)
    patched = patching.layer_pos_patch_setter(corrupted, (0, 1), clean)
    assert patched.tolist() == [[[0, 0, 0], [1, 1, 1]]]


def test_a_table_of_all_indices_counts_the_last_axis_first():
    table = patching.make_df_from_ranges((2, 3), ("layer", "pos"))
    assert list(table.columns) == ["layer", "pos"]
    assert table.to_numpy().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
