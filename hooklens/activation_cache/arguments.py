"""Reading the arguments of a cache's methods: how components are stacked, entries of an axis."""

from typing import TYPE_CHECKING, Literal, TypedDict

from torch import Tensor

from hooklens.arguments import Reader, optional, read_flag, read_int
from hooklens.errors import CacheError
from hooklens.hooks.choice import Choice, read_choice, resolve_choice

Mode = Literal["all", "mlp", "attn"]


if TYPE_CHECKING:

    class StackKeywords(TypedDict, total=False):
        """Keywords of every stack of components but for the one that its type depends on, `return_labels`."""

        apply_ln: bool
        pos_slice: Choice

    class StreamKeywords(StackKeywords, total=False):
        """What `accumulated_resid` takes besides."""

        incl_mid: bool
        mlp_input: bool

    class OutputKeywords(StackKeywords, total=False):
        """What `decompose_resid` takes besides."""

        mlp_input: bool
        mode: Mode
        incl_embeds: bool

    class HeadKeywords(StackKeywords, total=False):
        """What `stack_head_results` takes besides."""

        incl_remainder: bool
        project_output_onto: Tensor | None

    class NeuronKeywords(HeadKeywords, total=False):
        """What `stack_neuron_results` takes besides."""

        neuron_slice: Choice

    class DecompositionKeywords(StackKeywords, total=False):
        """What `get_full_resid_decomposition` takes besides."""

        mlp_input: bool
        expand_neurons: bool
        project_output_onto: Tensor | None


LAYER: dict[str, Reader] = {"layer": optional(read_int)}
STACKING: dict[str, Reader] = {**LAYER, "apply_ln": read_flag, "return_labels": read_flag}
"""Readers of how components are stacked; which positions and directions is read where these are taken."""


def choose(given: object, size: int, *, what: str, noun: str) -> tuple[list[int], bool]:
    """The entries of an axis that a caller names, counted from 0, and whether it is a single one, without an axis.

    Args:
        given: a `Choice`; a tuple is refused, as TransformerLens reads it as the arguments of a slice.
        size: how many entries the axis has.
        what: the argument, for messages.
        noun: what the entries are, for messages.

    Raises:
        CacheError: another kind, an entry that is not there or named twice, or none at all.
    """
    index = read_choice(given, what=what, refuse_tuple=True, error=CacheError)
    chosen = resolve_choice(index, size, what=what, noun=noun, error=CacheError)
    if not chosen:
        raise CacheError(f"{what}={given!r} chooses none of the {size} {noun}; expected at least one")
    return chosen, isinstance(index, int)
