"""Which tokens a call runs, where they stand in their sequences, and what each may attend to.

Everything follows from the attention mask: a row's positions count its real tokens, so left-padded,
right-padded and single rows give the same numbers. A `TokenPlan` is made once per call and handed to every
block; what no block asks for is not computed.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.hooks.selection import Phase

LogitsAt = int | slice | Sequence[int] | None


class TokenPlan:
    """The tokens of one call.

    Args:
        batch: rows.
        n_new: columns run in this call.
        attention_mask: real (True) and padding (False) columns of this call; None: all real.
        past_mask: the same for the columns in a key-value cache; one row serves every row of the batch.
        n_past: columns in the cache.
        positions: position of each column, to override what the masks say.
        phase: `"decode"` while generating, else `"prefill"`.
        device: where the call runs.

    Attributes:
        n_keys: past + new columns.
    """

    def __init__(
        self,
        *,
        batch: int,
        n_new: int,
        device: torch.device,
        attention_mask: Bool[Tensor, "batch pos"] | None = None,
        past_mask: Bool[Tensor, "rows past"] | None = None,
        n_past: int = 0,
        positions: Int[Tensor, "rows pos"] | None = None,
        phase: Phase = "prefill",
    ) -> None:
        self.batch, self.n_new, self.n_past, self.n_keys = batch, n_new, n_past, n_past + n_new
        self.device = device
        self.phase: Phase = phase
        self.attention_mask = attention_mask
        self.key_mask = self._join_masks(attention_mask, past_mask)
        self._positions = positions
        self._token_index: Tensor | None = None
        self._hidden: dict[int | None, Tensor | None] = {}
        self._new_part: TokenPlan | None = None
        self._additive: dict[tuple[int | None, torch.dtype], Tensor | None] = {}

    def _join_masks(self, new: Tensor | None, past: Tensor | None) -> Tensor | None:
        """Real columns of past + new, `[batch key]`; None when all are."""
        if new is None and past is None:
            return None
        if new is None:
            new = torch.ones(self.batch, self.n_new, dtype=torch.bool, device=self.device)
        if self.n_past == 0:
            return new
        if past is None:
            past = torch.ones(1, self.n_past, dtype=torch.bool, device=self.device)
        return torch.cat([past.expand(self.batch, -1), new], dim=1)

    @property
    def token_index(self) -> Int[Tensor, "batch pos"]:
        """The position of each column's token in its row's sequence, counted over real tokens; -1 for padding."""
        if self._token_index is None:
            if self.key_mask is None:
                index = torch.arange(self.n_past, self.n_keys, device=self.device).expand(self.batch, -1)
            else:
                index = (self.key_mask.cumsum(1) - 1).masked_fill(~self.key_mask, -1)[:, self.n_past :]
            self._token_index = index
        return self._token_index

    @property
    def n_tokens(self) -> Int[Tensor, " batch"]:
        """Real tokens of each row so far, those in the cache included."""
        if self.key_mask is None:
            return torch.full((self.batch,), self.n_keys, device=self.device)
        return self.key_mask.sum(1)

    @property
    def positions(self) -> Int[Tensor, "rows pos"]:
        """The position of each column, one row where all rows agree; padding stands at position 0."""
        if self._positions is not None:
            return self._positions
        if self.key_mask is None:
            return self.token_index[:1]
        return self.token_index.clamp(min=0)

    @property
    def n_positions(self) -> int:
        """A bound on the positions of this call: all are below it."""
        return self.n_keys if self._positions is None else int(self._positions.max()) + 1

    @property
    def is_contiguous(self) -> bool:
        """Whether positions simply go on from the cache, 0, 1, 2, ... in every row."""
        return self._positions is None and self.key_mask is None

    @property
    def key_positions(self) -> Int[Tensor, "rows key"]:
        """The position of each key, counted over real tokens; padding stands at position 0."""
        if self.key_mask is None:
            return torch.arange(self.n_keys, device=self.device)[None]
        return (self.key_mask.cumsum(1) - 1).clamp(min=0) * self.key_mask

    def is_causal_only(self, window: int | None) -> bool:
        """Whether "no token sees a later one" is all there is to hide."""
        return self.key_mask is None and self.n_past == 0 and (window is None or window >= self.n_keys)

    def hidden(self, window: int | None) -> Bool[Tensor, "rows one query key"] | None:
        """True where a query may not see a key; None when every query sees every key.

        Args:
            window: how many of the latest keys a query sees, itself included; None: all.
        """
        if window is not None and window >= self.n_keys:
            window = None
        if window not in self._hidden:
            self._hidden[window] = self._make_hidden(window)
        return self._hidden[window]

    def _make_hidden(self, window: int | None) -> Tensor | None:
        if self.n_new == 1 and self.key_mask is None and window is None:
            return None
        query = torch.arange(self.n_past, self.n_keys, device=self.device)[:, None]
        key = torch.arange(self.n_keys, device=self.device)[None, :]
        hidden = (key > query)[None, None]
        if self.key_mask is not None:
            hidden = hidden | ~self.key_mask[:, None, None, :]
            if window is not None:
                # Padding between past and new tokens does not count as distance.
                key_position = self.key_positions[:, None, None, :]
                query_position = self.key_positions[:, None, self.n_past :, None]
                hidden = hidden | (key_position <= query_position - window)
        elif window is not None:
            hidden = hidden | (key <= query - window)
        return hidden

    def additive_mask(self, window: int | None, dtype: torch.dtype) -> Float[Tensor, "rows one query key"] | None:
        """`hidden` as a term of the scores: -inf where a key is hidden, else 0."""
        key = (window, dtype)
        if key not in self._additive:
            hidden = self.hidden(window)
            self._additive[key] = (
                None
                if hidden is None
                else torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill(hidden, -torch.inf)
            )
        return self._additive[key]

    def new_part(self) -> "TokenPlan":
        """The plan as if the cache were not there: what the new tokens may attend to among themselves."""
        if self._new_part is None:
            self._new_part = TokenPlan(
                batch=self.batch, n_new=self.n_new, device=self.device, attention_mask=self.attention_mask
            )
        return self._new_part

    def past_mask(
        self, window: int | None, dtype: torch.dtype, *, fold_rows: bool
    ) -> Float[Tensor, "rows one some_query past"] | None:
        """What the new tokens may not see of the cache, as a term of the scores; None when they see all of it.

        Args:
            window: how many of the latest keys a query sees; None: all.
            dtype: of the scores.
            fold_rows: the queries of all rows stand one after another in one row.
        """
        if window is not None and window >= self.n_keys:
            window = None
        if window is None:
            if self.key_mask is None or bool(self.key_mask[:, : self.n_past].all()):
                return None
            # Padding hides the same from all queries of a row, and folded rows have one past.
            rows = slice(1) if fold_rows else slice(None)
            hidden = ~self.key_mask[rows, None, None, : self.n_past]
            return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill(hidden, -torch.inf)
        whole = self.hidden(window)
        assert whole is not None
        hidden = whole[..., : self.n_past]
        if fold_rows:
            hidden = hidden.expand(self.batch, -1, -1, -1).reshape(1, 1, self.batch * self.n_new, self.n_past)
        return torch.zeros(hidden.shape, dtype=dtype, device=self.device).masked_fill(hidden, -torch.inf)

    @property
    def can_hide_all(self) -> bool:
        """Whether some query may see no key at all, as a padding column does."""
        return self.key_mask is not None

    def select_columns(self, wanted: LogitsAt) -> slice | Int[Tensor, "batch chosen"]:
        """The columns that hold the wanted positions of each row.

        Args:
            wanted: positions among the real tokens of this call, per row; negative ones count from its last
                real token. An int keeps the axis, with size 1.

        Raises:
            InputError: a position outside a row, no position, a slice that runs backwards, or one that selects
                different numbers of tokens.
        """
        if isinstance(wanted, slice):
            if wanted.step is not None and wanted.step < 1:
                raise InputError(f"logits_at: {wanted!r} runs backwards; give a list of positions")
        elif not isinstance(wanted, int) and not wanted:
            raise InputError("logits_at is empty; give at least one position, or return_type=None for no logits")
        if self.attention_mask is None:
            columns = range(self.n_new)
            if isinstance(wanted, slice):
                return wanted
            chosen = [wanted] if isinstance(wanted, int) else list(wanted or ())
            outside = [p for p in chosen if not -self.n_new <= p < self.n_new]
            if outside:
                raise InputError(f"logits_at: {outside} out of range; this call runs {self.n_new} positions")
            index = [columns[p] for p in chosen]
            if len(index) == 1:
                return slice(index[0], index[0] + 1)
            return torch.tensor([index], device=self.device).expand(self.batch, -1)
        if isinstance(wanted, slice) and wanted == slice(None):
            return wanted
        rows = []
        for row, mask in enumerate(self.attention_mask):
            real = mask.nonzero()[:, 0]
            try:
                chosen_columns = real[wanted] if isinstance(wanted, slice) else real[torch.as_tensor(wanted)]
            except IndexError:
                raise InputError(
                    f"logits_at: {wanted!r} out of range in row {row}, which has {len(real)} real tokens"
                ) from None
            rows.append(chosen_columns.reshape(-1))
        if len({len(row) for row in rows}) > 1:
            raise InputError(
                f"logits_at: {wanted!r} selects different numbers of tokens in rows of lengths "
                f"{[int(n) for n in self.attention_mask.sum(1)]}; give positions that every row has"
            )
        return torch.stack(rows)
