"""Names that differ by layer, written as one."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from hooklens.display import format_numbers, layer_of_name, merge_layers


@given(st.sets(st.integers(0, 60)))
def test_numbers_are_read_back(numbers):
    text = format_numbers(sorted(numbers))
    ends = [list(map(int, part.split("-"))) for part in text.split(",") if part]
    assert {number for run in ends for number in range(run[0], run[-1] + 1)} == numbers
    # No shorter list of runs says the same.
    assert all(after[0] > before[-1] + 1 for before, after in pairwise(ends))


def test_only_names_with_one_key_are_merged():
    named = [("hook_embed", 1), ("blocks.0.attn.hook_z", 1), ("blocks.1.attn.hook_z", 2), ("blocks.2.attn.hook_z", 1)]
    assert merge_layers(named) == [
        ("hook_embed", 1, 1), ("blocks.{0,2}.attn.hook_z", 1, 2), ("blocks.1.attn.hook_z", 2, 1),
    ]  # fmt: skip
    assert merge_layers([("model.layers.3.mlp", None), ("model.layers.4.mlp", None)]) == [
        ("model.layers.{3-4}.mlp", None, 2)
    ]


def test_the_layer_of_a_name():
    assert layer_of_name("blocks.12.attn.hook_z") == 12
    assert layer_of_name("hook_embed") is None
    assert layer_of_name("myblocks.1") is None
