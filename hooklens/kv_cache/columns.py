"""What a cache knows of its columns: which of them are tokens, whose documents they are, and which ids they have."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooklens.errors import CacheError
from hooklens.kv_cache.documents import ColumnDocuments
from hooklens.kv_cache.ids import ColumnIds, read_token_ids, rows_of_ids
from hooklens.kv_cache.mask import ColumnMask


class ColumnRecord:
    """The record of a cache's columns; the base of `HookedKeyValueCache`.

    Args:
        mask: which columns are tokens.
        documents: which document each belongs to; None: rows are one document each.
    """

    def __init__(self, mask: ColumnMask, documents: ColumnDocuments | None) -> None:
        self._mask = mask
        self._documents = documents
        self._ids = ColumnIds.none(self.batch_size, mask.columns.device)

    def __len__(self) -> int:
        """Columns so far, padding included."""
        return self._mask.columns.shape[1]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._mask.columns.shape[0]

    @property
    def has_padding(self) -> bool:
        """Whether any cached column is padding, known without a look at the device."""
        return self._mask.has_padding

    @property
    def document_ids(self) -> Int[Tensor, "batch pos"] | None:
        """The document of each cached column, as numbers; None where rows are one document each.

        Padding has the number of a token beside it.
        """
        return None if self._documents is None or not len(self) else self._documents.ids

    @property
    def restarts_positions(self) -> bool:
        """Whether positions are counted within each document of the cache; True without documents."""
        return self._documents is None or self._documents.restarts_positions

    @property
    def continued_lengths(self) -> Int[Tensor, " batch"]:
        """The position at which each row goes on: its tokens, or those of its last document where positions restart."""
        mask, documents = self._mask.columns, self._documents
        if documents is not None and documents.restarts_positions:
            mask = mask & (documents.ids == documents.ids[:, -1:])
        return mask.sum(1)

    @property
    def token_ids(self) -> Int[Tensor, "batch pos"] | None:
        """The token in each column, by which text is encoded that goes on from them; None: not known.

        A model that fills the cache with tokens writes them here. Columns of a residual stream (`start_at_layer`) have
        none, and neither has a file that was saved without them; who knows them may set them, on a frozen cache, too.
        What stands in columns of padding says nothing.

        Raises:
            CacheError: on setting: not one integer for each column.
        """
        return self._ids.all_of(len(self))

    @token_ids.setter
    def token_ids(self, ids: Int[Tensor, "batch pos"] | None) -> None:
        if ids is None:
            self._ids = ColumnIds.none(self.batch_size, self._mask.columns.device)
            return
        read = read_token_ids(ids, batch=self.batch_size, n_columns=len(self))
        self._ids = ColumnIds(read.to(self._mask.columns.device))

    def token_rows(self) -> list[list[int]]:
        """The token ids of each row without padding, in plain numbers; waits for the device.

        Raises:
            CacheError: they are not known.
        """
        return rows_of_ids(self.token_ids, self._mask.columns)

    def check_columns(self) -> None:
        """Check that documents and mask are of the same columns.

        Raises:
            CacheError: they are not.
        """
        if self._documents is not None and self._documents.ids.shape != self._mask.columns.shape:
            raise CacheError(
                f"the document ids cover {list(self._documents.ids.shape)} rows and columns, the attention mask "
                f"{list(self._mask.columns.shape)}"
            )

    def _append_columns(
        self,
        new: Bool[Tensor, "batch new"],
        all_tokens: bool | None,  # noqa: FBT001
        documents: ColumnDocuments | None,
        ids: Int[Tensor, "batch new"] | None,
    ) -> None:
        if documents is not None:
            documents = documents.lasting(torch.Size((self.batch_size, len(self) + new.shape[1])))
        elif self._documents is not None and len(self):
            documents = self._documents.gone_on(new.shape[1])
        self._documents = documents
        self._ids = self._ids.join(ids, n_columns=len(self))
        self._mask = self._mask.join(new, all_tokens=all_tokens)

    def _cut_columns(self, n: int) -> None:
        """Keep the first `n` columns."""
        if n < len(self):
            self._mask = self._mask.part(self._mask.columns[:, :n])
        if self._documents is not None:
            self._documents = self._documents.changed(lambda ids: ids[:, :n])
        self._ids = self._ids.change(lambda ids: ids[:, :n])

    def _derive_columns(
        self, derived: "ColumnRecord", mask: Callable[[ColumnMask], ColumnMask], change: Callable[[Tensor], Tensor]
    ) -> None:
        """Make the record of a cache that is made from this one."""
        documents = None if self._documents is None else self._documents.changed(change)
        ColumnRecord.__init__(derived, mask(self._mask), documents)
        derived._ids = self._ids.change(change)
