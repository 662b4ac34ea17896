"""Reading the arguments of a cache's methods: how components are stacked, entries of an axis."""

from hooklens.arguments import Reader, optional, read_flag, read_int
from hooklens.errors import CacheError
from hooklens.hooks.choice import read_choice, resolve_choice

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
