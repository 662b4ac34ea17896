"""Documents that share a row: what a caller says about them, and which document each column of a call belongs to.

The documents of a row stand one after another, each in one piece. A token sees those of its own document only
(`hooklens.model.plan.visibility.SameDocument`), and positions are counted within it, so that a packed row gives what
its documents give alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.arguments import read_numbers, refusal
from hooklens.documents import NO_DOCUMENT
from hooklens.errors import CacheError, HookLensError, InputError
from hooklens.hooks.choice import Choice, Index, read_choice, resolve_choice
from hooklens.kv_cache import HookedKeyValueCache

if TYPE_CHECKING:
    from hooklens.model.plan.positions import TokenPlan

Borders = Bool[Tensor, "..."] | Choice
"""Where documents start: a boolean for each column, `[pos]` or `[batch pos]`, or columns, the same in all rows."""

_IDS = f"whole numbers [pos] or [batch pos], {NO_DOCUMENT} for padding"
_BORDERS = "booleans [pos] or [batch pos], True where a document starts, or columns (an int, a slice, a list)"


class DocumentMarks(NamedTuple):
    """What a caller said about the documents of the columns that run; at most one of the two is given.

    Attributes:
        ids: the document of each column; `NO_DOCUMENT` is padding.
        borders: True where a document starts.
        restart_positions: count positions within each document. None: as the cache does, else where documents hide each
            other (`cfg.document_mask`).
    """

    ids: Int[Tensor, "rows pos"] | None = None
    borders: Bool[Tensor, "rows pos"] | None = None
    restart_positions: bool | None = None


@dataclass(frozen=True)
class DocumentColumns:
    """The documents of all columns of a call, past + new.

    Attributes:
        ids: a number for each; padding has that of a token beside it.
        key_mask: which columns are tokens; None: all.
        goes_on: the new tokens are known to be of one document, the last one of the past.
        restarts: positions are counted within each document, not along the row.
    """

    ids: Int[Tensor, "rows key"]
    key_mask: Bool[Tensor, "batch key"] | None
    goes_on: bool
    restarts: bool

    def count_positions(self) -> Int[Tensor, "_ key"]:
        """The position of each token within its document; padding has 0."""
        is_first = self._find_firsts()
        if self.key_mask is None:
            counted = torch.arange(self.ids.shape[1], device=self.ids.device)[None]
            return counted - torch.where(is_first, counted, 0).cummax(1).values
        counted = self.key_mask.cumsum(1)
        before = counted - self.key_mask.long()
        within = counted - 1 - torch.where(is_first, before, 0).cummax(1).values
        return within.clamp(min=0) * self.key_mask

    def count_lengths(self) -> Int[Tensor, "_ key"]:
        """The number of tokens of each column's document."""
        which = self._find_firsts().cumsum(1) - 1
        tokens = torch.ones_like(self.ids) if self.key_mask is None else self.key_mask.long()
        which = which.expand(len(tokens), -1)
        return torch.zeros_like(which).scatter_add(1, which, tokens).gather(1, which)

    def _find_firsts(self) -> Bool[Tensor, "rows key"]:
        """Columns whose number is another than that of the column before."""
        first = torch.ones_like(self.ids[:, :1], dtype=torch.bool)
        return torch.cat([first, self.ids[:, 1:] != self.ids[:, :-1]], 1)


def read_document_ids(given: object, *, what: str, error: type[HookLensError] = InputError) -> Int[Tensor, "..."]:
    """The document of each column; the shape is checked against the input.

    Raises:
        HookLensError: no whole numbers, or not along one or two axes.
    """
    ids = read_numbers(given, what=what, expected=_IDS, error=error)
    is_whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not is_whole or ids.ndim not in (1, 2) or not ids.numel():
        raise refusal(given, what, _IDS, error)
    return ids.long()


def read_document_borders(
    given: object, *, what: str, error: type[HookLensError] = InputError
) -> Bool[Tensor, "..."] | Index:
    """Where documents start; the shape or the columns are checked against the input.

    Raises:
        HookLensError: neither booleans along one or two axes nor columns.
    """
    if _holds_booleans(given):
        flags = read_numbers(given, what=what, expected=_BORDERS, error=error)
        if flags.ndim not in (1, 2) or not flags.numel():
            raise refusal(given, what, _BORDERS, error)
        return flags
    try:
        return read_choice(given, what=what, error=error)
    except error as found:
        raise error(f"{found}; document borders are {_BORDERS}") from None


def _holds_booleans(given: object) -> bool:
    if isinstance(given, Tensor):
        return given.dtype == torch.bool
    if isinstance(given, np.ndarray):
        return bool(given.dtype == np.bool_)
    if isinstance(given, list | tuple) and given:
        first = given[0]
        return isinstance(first, bool | np.bool_) or _holds_booleans(first)
    return False


def read_marks(
    document_ids: object,
    document_borders: object,
    restart_positions: bool | None,  # noqa: FBT001
    *,
    batch: int,
    n_new: int,
) -> DocumentMarks | None:
    """What was said about documents, in the shape of the input; None: nothing.

    Raises:
        InputError: both ids and borders, another shape than the input's, columns out of range, or negative ids.
    """
    if document_ids is None and document_borders is None:
        return None if restart_positions is None else DocumentMarks(restart_positions=restart_positions)
    if document_ids is not None and document_borders is not None:
        raise InputError("document_ids and document_borders say the same in two ways; leave one of them out")
    if document_ids is not None:
        ids = read_document_ids(document_ids, what="document_ids")
        rows = _as_rows(ids, "document_ids", batch, n_new)
        if not torch.compiler.is_compiling() and bool((rows < NO_DOCUMENT).any()):
            raise InputError(
                f"document_ids hold {int(rows.min())}; expected numbers from 0 on, and {NO_DOCUMENT} for padding"
            )
        return DocumentMarks(ids=rows, restart_positions=restart_positions)
    borders = read_document_borders(document_borders, what="document_borders")
    if not isinstance(borders, Tensor):
        columns = resolve_choice(borders, n_new, what="document_borders", noun="positions run in this call")
        borders = torch.zeros(n_new, dtype=torch.bool)
        borders[columns] = True
    return DocumentMarks(
        borders=_as_rows(borders, "document_borders", batch, n_new), restart_positions=restart_positions
    )


def _as_rows(given: Tensor, what: str, batch: int, n_new: int) -> Tensor:
    rows = given[None] if given.ndim == 1 else given
    if rows.shape[1] != n_new or rows.shape[0] not in (1, batch):
        raise InputError(
            f"{what} has shape {list(given.shape)}; expected [{n_new}] or [{batch}, {n_new}], the shape of the tokens "
            "that run"
        )
    return rows


def hide_padding(
    mask: Bool[Tensor, "batch pos"] | None, marks: DocumentMarks, *, batch: int, n_past: int
) -> Bool[Tensor, "batch pos"] | None:
    """The attention mask with what document ids call padding hidden, too; None where nothing is hidden.

    Raises:
        InputError: a row has no token.
    """
    if marks.ids is None:
        return mask
    in_document = (marks.ids != NO_DOCUMENT).expand(batch, -1)
    if not torch.compiler.is_compiling() and bool(in_document.all()):
        return mask
    tokens = in_document if mask is None else mask & in_document.to(mask.device)
    if not n_past and not torch.compiler.is_compiling():
        empty = (~tokens).all(1).nonzero()[:, 0].tolist()
        if empty:
            raise InputError(f"document_ids leave no token in rows {empty}, all is padding; leave empty rows out")
    return tokens


def place_documents(
    marks: DocumentMarks | None,
    cache: HookedKeyValueCache | None,
    plan: "TokenPlan",
    mask: Bool[Tensor, "batch new"] | None,
) -> DocumentColumns | None:
    """The documents of past + new columns; None: rows are one document each.

    Without ids and borders, new tokens go on with the last document of the cache.

    Args:
        marks: what was said about the new columns.
        cache: what came before.
        plan: the tokens of the call.
        mask: which of the new columns are tokens, where that was given; None: all.

    Raises:
        InputError: a document in several pieces, nothing to count positions within, or positions that were given.
        CacheError: ids after a past that has none, or positions counted in another way than in the past.
    """
    past = None if cache is None else cache.document_ids
    n_past, device = plan.n_past, plan.device
    if plan.given_positions is not None and marks is not None and marks.restart_positions is not None:
        raise InputError("positions and restart_positions both say where tokens stand; leave one of them out")
    restarts = _choose_counting(marks, cache, by_default=plan.document_mask)
    if marks is None or (marks.ids is None and marks.borders is None):
        if past is None:
            return None
        ids = torch.cat([past, past[:, -1:].expand(-1, plan.n_new)], 1)
        return DocumentColumns(ids, plan.key_mask, goes_on=True, restarts=restarts)
    if marks.ids is not None:
        if n_past and past is None:
            raise CacheError(
                f"document_ids after {n_past} cached columns that have none: which of them would be theirs is not "
                "known. Give document_ids when the cache is made, or document_borders, which say where new ones start"
            )
        new = _fill_padding(marks.ids, mask, past)
        _check_pieces(new, past)
        new = new.to(device)
    else:
        assert marks.borders is not None
        count = marks.borders.to(device).cumsum(1)
        new = count if past is None else torch.where(count == 0, past[:, -1:], past.amax(1, keepdim=True) + count)
    if n_past:
        if past is None:
            past = torch.zeros(1, n_past, dtype=torch.long, device=device)
        rows = max(len(past), len(new))
        new = torch.cat([past.expand(rows, -1), new.expand(rows, -1)], 1)
    return DocumentColumns(new, plan.key_mask, goes_on=False, restarts=restarts)


def _choose_counting(
    marks: DocumentMarks | None,
    cache: HookedKeyValueCache | None,
    *,
    by_default: bool,
) -> bool:
    """Whether positions are counted within documents, where nothing is asked by default."""
    asked = None if marks is None else marks.restart_positions
    kept = None if cache is None or cache.document_ids is None else cache.restarts_positions
    if asked is not None and kept is None and marks is not None and marks.ids is None and marks.borders is None:
        raise InputError(
            f"restart_positions={asked} was given, and there are no documents; give document_ids or document_borders"
        )
    if asked is not None and kept is not None and asked != kept:
        raise CacheError(
            f"restart_positions={asked}, but the cached keys stand where restart_positions={kept} put them; leave it "
            "out, or make the cache anew"
        )
    if kept is not None:
        return kept
    return by_default if asked is None else asked


def _fill_padding(
    ids: Int[Tensor, "rows new"], mask: Bool[Tensor, "batch new"] | None, past: Int[Tensor, "_ past"] | None
) -> Int[Tensor, "_ new"]:
    """The ids with padding's place taken by the token before it, or else the first one."""
    if mask is None:
        return ids
    mask = mask.to(ids.device)
    ids = ids.expand(len(mask), -1)
    latest = torch.where(mask, torch.arange(ids.shape[1], device=ids.device), -1).cummax(1).values
    first = ids.gather(1, mask.int().argmax(1, keepdim=True)) if past is None else past[:, -1:].to(ids.device)
    return torch.where(latest < 0, first, ids.gather(1, latest.clamp(min=0)))


def _check_pieces(new: Int[Tensor, "rows new"], past: Int[Tensor, "_ past"] | None) -> None:
    """Refuse documents that do not stand in one piece.

    Raises:
        InputError: some do not; their rows are named.
    """
    if torch.compiler.is_compiling():
        return
    whole = new
    if past is not None:
        rows = max(len(past), len(new))
        whole = torch.cat([past.to(new.device).expand(rows, -1), new.expand(rows, -1)], 1)
    broken = (_count_changes(whole) != _count_changes(whole.sort(1).values)).nonzero()[:, 0].tolist()
    if broken:
        raise InputError(
            f"document_ids: in rows {broken} a document is interrupted by another one; the tokens of a document must "
            "stand one after another" + ("" if past is None else ", those in the key-value cache included")
        )


def _count_changes(ids: Int[Tensor, "rows pos"]) -> Int[Tensor, " rows"]:
    return (ids[:, 1:] != ids[:, :-1]).sum(1)
