"""Patch setters: which entries of a corrupted activation take the clean run's, by an index, in place.

`generic_activation_patch` calls them with each index of its table.
"""

from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import reads
from hooklens.errors import InputError
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

Pattern = Float[Tensor, "batch head query key"]


def _set(corrupted: Tensor, index: Sequence[int], clean: Tensor, axes: tuple[str, ...], axis: int) -> Tensor:
    """Set the entries of an index, whose first number is the layer and the others stand from an axis on."""
    if len(index) != len(axes):
        raise InputError(f"the index {list(index)} has {len(index)} numbers; expected {len(axes)}: {', '.join(axes)}")
    place: tuple[slice | int, ...] = (*(slice(None),) * axis, *index[1:])
    corrupted[place] = clean[place]
    return corrupted


def layer_pos_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos ..."], index: Sequence[int], clean_activation: Tensor
) -> Float[Tensor, "batch pos ..."]:
    """One position; the index is `(layer, pos)`."""
    return _set(corrupted_activation, index, clean_activation, ("layer", "pos"), 1)


def layer_pos_head_vector_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos head d_head"], index: Sequence[int], clean_activation: Tensor
) -> Float[Tensor, "batch pos head d_head"]:
    """One head at one position; the index is `(layer, pos, head)`."""
    return _set(corrupted_activation, index, clean_activation, ("layer", "pos", "head"), 1)


def layer_head_vector_patch_setter(
    corrupted_activation: Float[Tensor, "batch pos head d_head"], index: Sequence[int], clean_activation: Tensor
) -> Float[Tensor, "batch pos head d_head"]:
    """One head at all positions; the index is `(layer, head)`."""
    return _set(corrupted_activation, index, clean_activation, ("layer", "head"), 2)


def layer_head_pattern_patch_setter(
    corrupted_activation: Pattern, index: Sequence[int], clean_activation: Tensor
) -> Pattern:
    """The pattern of one head; the index is `(layer, head)`."""
    return _set(corrupted_activation, index, clean_activation, ("layer", "head"), 1)


def layer_head_pos_pattern_patch_setter(
    corrupted_activation: Pattern, index: Sequence[int], clean_activation: Tensor
) -> Pattern:
    """One row of a head's pattern; the index is `(layer, head, dest_pos)`."""
    return _set(corrupted_activation, index, clean_activation, ("layer", "head", "dest_pos"), 1)


def layer_head_dest_src_pos_pattern_patch_setter(
    corrupted_activation: Pattern, index: Sequence[int], clean_activation: Tensor
) -> Pattern:
    """One entry of a head's pattern; the index is `(layer, head, dest_pos, src_pos)`."""
    return _set(corrupted_activation, index, clean_activation, ("layer", "head", "dest_pos", "src_pos"), 1)


@reads()
def make_df_from_ranges(column_max_ranges: Sequence[int], column_names: Sequence[str]) -> "pandas.DataFrame":
    """All indices below some maxima, one in each row: an `index_df` to take rows of."""
    rows = product(*(range(most) for most in column_max_ranges))
    table: pandas.DataFrame = import_package("pandas").DataFrame(list(rows), columns=list(column_names))
    return table


SETTERS: dict[tuple[bool, str], Callable[[Tensor, Sequence[int], Tensor], Tensor]] = {
    (False, "layer pos"): layer_pos_patch_setter,
    (False, "layer pos head"): layer_pos_head_vector_patch_setter,
    (False, "layer head"): layer_head_vector_patch_setter,
    (True, "layer head"): layer_head_pattern_patch_setter,
    (True, "layer head dest_pos"): layer_head_pos_pattern_patch_setter,
    (True, "layer head dest_pos src_pos"): layer_head_dest_src_pos_pattern_patch_setter,
}
"""The patch setter of an index: of patterns or not, and its axes."""
