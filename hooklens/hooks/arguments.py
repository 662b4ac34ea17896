"""Hooks, edits and captures as the arguments of a call."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch

from hooklens.arguments import (
    Reader,
    is_function,
    optional,
    read_device,
    read_dtype,
    read_flag,
    refusal,
    show,
)
from hooklens.errors import HookLensError, InputError
from hooklens.hooks.call import HookFunction
from hooklens.hooks.choice import Choice
from hooklens.hooks.edits import Edit
from hooklens.hooks.names import NamesFilter
from hooklens.hooks.splice import Splice, read_splices

HookList = Sequence[tuple[NamesFilter, HookFunction]]


if TYPE_CHECKING:

    class HookKeywords(TypedDict, total=False):
        """Keywords that say what listens to a call."""

        fwd_hooks: HookList
        bwd_hooks: HookList
        edits: Sequence[Edit]
        splices: Sequence[Splice]

    class CaptureKeywords(TypedDict, total=False):
        """Keywords that say what a call keeps."""

        names_filter: NamesFilter
        device: torch.device | str | None
        dtype: torch.dtype | None
        incl_bwd: bool
        pos_slice: Choice


def read_pairs(given: object, *, what: str, error: type[HookLensError] = InputError) -> HookList:
    """Hooks of a call: pairs (name or filter, function).

    Raises:
        HookLensError: no list, or entries that are no such pairs.
    """
    if type(given) is tuple and not given:
        return given
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise refusal(given, what, "a list of pairs (name or filter, function)", error)
    wrong = {place: one for place, one in enumerate(given) if not _is_pair(one)}
    if wrong:
        raise error(f"{what}: {_list_entries(wrong)}, expected pairs (name or filter, function)")
    return given


def _is_pair(given: object) -> bool:
    return isinstance(given, tuple | list) and len(given) == 2 and is_function(given[1])


def read_edits(given: object, *, what: str = "edits", error: type[HookLensError] = InputError) -> Sequence[Edit]:
    """Edits of a call.

    Raises:
        HookLensError: no list, or entries that are no edits.
    """
    if type(given) is tuple and not given:
        return given
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        hint = ", [edit] for a single one" if isinstance(given, Edit) else ""
        raise refusal(given, what, f"a list of values from hooklens.edits{hint}", error)
    wrong = {place: one for place, one in enumerate(given) if not isinstance(one, Edit)}
    if wrong:
        raise error(f"{what}: {_list_entries(wrong)}, expected values from hooklens.edits")
    return given


def _list_entries(entries: Mapping[int, object], *, limit: int = 5) -> str:
    shown = [f"entry {place} is {show(one)}" for place, one in list(entries.items())[:limit]]
    more = f" and {len(entries) - limit} more" if len(entries) > limit else ""
    return ", ".join(shown) + more


LISTENING: dict[str, Reader] = {
    "fwd_hooks": read_pairs,
    "bwd_hooks": read_pairs,
    "edits": read_edits,
    "splices": read_splices,
}
"""Readers of what listens to a call."""

CAPTURING: dict[str, Reader] = {"device": optional(read_device), "dtype": optional(read_dtype), "incl_bwd": read_flag}
"""Readers of how activations are kept; which ones and what of them is read where the points are known."""
