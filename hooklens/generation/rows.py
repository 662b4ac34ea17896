"""The rows of a generation: their tokens, which have ended, and which still go through the model."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from hooklens.generation.choosing.processors import RowIds
from hooklens.generation.choosing.stopping import FinishReason
from hooklens.generation.prompts import Prompts, join_sequences

# Rows that have ended leave the batch when they are at least this fraction of it: leaving copies the cache.
_LEAVING_FRACTION = 1 / 8


class Rows:
    """Row `i * n_samples + j` is sample `j` of prompt `i`.

    Args:
        prompts: what the rows begin with.
        n_samples: rows for each prompt.
        max_new_tokens: most tokens to come.
        keeps_all: rows that have ended stay in the batch.
        needs_table: somebody reads whole sequences at every step.

    Attributes:
        new_ids: the new tokens of each row.
        reasons: why each row ended; None: it goes on.
        active: the rows that go through the model, in order.
        places: where in `active` each unfinished row stands, in order.
    """

    def __init__(
        self, prompts: Prompts, *, n_samples: int, max_new_tokens: int, keeps_all: bool, needs_table: bool
    ) -> None:
        n_rows = len(prompts.lengths) * n_samples
        self.new_ids: list[list[int]] = [[] for _ in range(n_rows)]
        self.reasons: list[FinishReason | None] = [None] * n_rows
        self.active = list(range(n_rows))
        self.places = list(range(n_rows))
        self._keeps_all = keeps_all
        self.n_columns = prompts.ids.shape[1]
        # Row by row, all tokens with padding before them, those in a key-value cache included, and what came after.
        self._table: Tensor | None = None
        self._padding: list[int] = []
        if needs_table:
            sequences = join_sequences(prompts)
            self._n_cached = sequences.shape[1] - self.n_columns
            self._padding = [
                sequences.shape[1] - before - length
                for before, length in zip(prompts.n_before, prompts.lengths, strict=True)
                for _ in range(n_samples)
            ]
            self._table = sequences.new_zeros(n_rows, sequences.shape[1] + max_new_tokens)
            self._table[:, : sequences.shape[1]] = sequences.repeat_interleave(n_samples, 0)
        self._active_index: Tensor | None = None
        self.device = prompts.ids.device

    def __len__(self) -> int:
        return len(self.new_ids)

    @property
    def done(self) -> bool:
        """Whether every row has ended."""
        return not self.places

    @property
    def finished_places(self) -> list[int]:
        """Places of the batch that hold rows that have ended."""
        if len(self.places) == len(self.active):
            return []
        return [place for place, row in enumerate(self.active) if self.reasons[row] is not None]

    @property
    def active_index(self) -> Int[Tensor, " active"]:
        """The active rows as an index."""
        if self._active_index is None:
            self._active_index = torch.tensor(self.active, device=self.device)
        return self._active_index

    @property
    def table(self) -> Int[Tensor, "active pos"]:
        """All tokens of the active rows, with the padding before them."""
        assert self._table is not None
        table = self._table[:, : self._n_cached + self.n_columns]
        return table if len(self.active) == len(self) else table[self.active_index]

    @property
    def ids(self) -> RowIds:
        """The tokens of the active rows, as processors see them."""
        padding = [self._padding[row] for row in self.active]
        return RowIds(padded=self.table, padding=padding if any(padding) else None)

    def append(self, tokens: Int[Tensor, " active"]) -> None:
        """Add a token to every row that goes on."""
        if self._table is not None:
            # Rows that have left keep what they have; what follows an ended row's last token is never read.
            rows = slice(None) if len(self.active) == len(self) else self.active_index
            self._table[rows, self._n_cached + self.n_columns] = tokens
        self.n_columns += 1
        ids = tokens.tolist()
        for place in self.places:
            self.new_ids[self.active[place]].append(ids[place])

    def end(self, reasons: Sequence[FinishReason | None]) -> list[int] | None:
        """Note which rows have ended, one entry for each of `places`.

        Returns:
            The places of the rows that stay in the batch, or None when all do.
        """
        for place, reason in zip(self.places, reasons, strict=True):
            self.reasons[self.active[place]] = reason
        self.places = [place for place, reason in zip(self.places, reasons, strict=True) if reason is None]
        n_ended = len(self.active) - len(self.places)
        if self._keeps_all or not self.places or n_ended == 0 or n_ended < _LEAVING_FRACTION * len(self.active):
            return None
        staying = self.places
        self.active = [self.active[place] for place in staying]
        self._active_index = None
        self.places = list(range(len(self.active)))
        return staying
