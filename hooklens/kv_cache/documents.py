"""Which document each column of a cache belongs to, where its rows hold several."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.errors import CacheError
from hooklens.kv_cache.arguments import require
from hooklens.kv_cache.inference import lasting_tensors


class ColumnDocuments(NamedTuple):
    """The documents of columns.

    Attributes:
        ids: a number for each; padding has that of a token beside it.
        restarts_positions: positions are counted within each document, not along the row.
    """

    ids: Int[Tensor, "batch pos"]
    restarts_positions: bool

    def changed(self, change: Callable[[Tensor], Tensor]) -> "ColumnDocuments":
        """The documents of other rows or columns."""
        return self._replace(ids=change(self.ids))

    def gone_on(self, n_new: int) -> "ColumnDocuments":
        """The documents of these columns and of new ones, which belong to the last one."""
        with lasting_tensors():
            return self.changed(lambda ids: torch.cat([ids, ids[:, -1:].expand(-1, n_new)], 1))

    def lasting(self, columns: torch.Size) -> "ColumnDocuments":
        """The same for a cache of these columns `[batch pos]`, in a tensor that can be used in every mode.

        Raises:
            CacheError: the documents are of other columns.
        """
        rows, n_columns = self.ids.shape if self.ids.ndim == 2 else (0, 0)
        if rows not in (1, columns[0]) or n_columns != columns[1]:
            raise CacheError(
                f"document ids are {list(self.ids.shape)}; expected {list(columns)}, of past + new columns"
            )
        with lasting_tensors():
            return self.changed(lambda ids: (ids.clone() if ids.is_inference() else ids).expand(columns))


def read_documents(ids: object, restarts_positions: object, *, columns: torch.Size) -> ColumnDocuments | None:
    """Documents that a caller gave; None: rows are one document each.

    Raises:
        CacheError: no whole numbers for the columns `[batch pos]`, or no switch.
    """
    require(restarts_positions, bool, what="restarts_positions", expected="True or False")
    if ids is None:
        return None
    assert isinstance(restarts_positions, bool)
    found = f"a {type(ids).__name__}" if not isinstance(ids, Tensor) else f"{ids.dtype} {list(ids.shape)}"
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64 or ids.shape != columns:
        raise CacheError(f"document_ids are {found}; expected torch.int64 {list(columns)}, a number for each column")
    return ColumnDocuments(ids, restarts_positions)
