"""Rows of tokens with padding anywhere, where each token stands, and what it sees."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Whole sequences, however they were run.

    Attributes:
        tokens: ids, padding filled with anything.
        mask: True for tokens, False for padding, which may stand anywhere.
        given_positions: where they are not simply counted; rows without padding then.
    """

    tokens: Int[Tensor, "batch pos"]
    mask: Bool[Tensor, "batch pos"]
    given_positions: Int[Tensor, " pos"] | None = None

    def positions(self) -> Int[Tensor, "batch pos"]:
        """How many tokens of its row stand before each token; 0 for padding."""
        rows = []
        for row in self.mask.tolist():
            positions, count = [], 0
            for is_token in row:
                positions.append(count if is_token else 0)
                count += is_token
            rows.append(positions)
        if self.given_positions is not None:
            rows = [self.given_positions.tolist()] * len(rows)
        return torch.tensor(rows, device=self.mask.device)

    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [sum(row) for row in self.mask.tolist()]

    def visible(
        self, window: int | None, chunk: int | None = None, *, causal: bool = True
    ) -> Bool[Tensor, "batch query key"]:
        """Which keys each query sees: tokens, less than `window` positions away; no later column if causal.

        With chunks of positions, those of its own only.
        """
        batch, n = self.mask.shape
        visible = torch.zeros(batch, n, n, dtype=torch.bool, device=self.mask.device)
        positions = self.positions()
        for query in range(n):
            stop = query + 1 if causal else n
            seen = self.mask[:, :stop]
            if window is not None:
                back = positions[:, query, None] - positions[:, :stop]
                seen = seen & ((back if causal else back.abs()) < window)
            if chunk is not None:
                seen = seen & (positions[:, query, None] // chunk == positions[:, :stop] // chunk)
            visible[:, query, :stop] = seen
        return visible
