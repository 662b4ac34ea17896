"""Which tokens a call runs, and where they stand in their sequences.

Everything follows from the attention mask: a row's positions count its real tokens, so left-padded,
right-padded and single rows give the same numbers. A `TokenPlan` is made once per call and handed to every
block; what no block asks for is not computed.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.hooks.call import Phase
from hooklens.hooks.choice import Choice, read_choice, resolve_choice
from hooklens.model.plan.documents import DocumentColumns
from hooklens.model.plan.visibility import Causal, Padding, Reach, Rule, SameDocument, Sight, Visibility, reach_rules

LogitsAt = Choice
Made = TypeVar("Made")
_CAUSAL: tuple[Rule, ...] = (Causal(), Padding())


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
        causal: no query sees a later key.
        document_mask: no query sees a key of another document.

    Attributes:
        n_keys: past + new columns.
        key_mask: which of past + new columns are tokens, `[batch key]`; None: all.
        documents: of past + new columns, set before anything runs; None: rows are one document each.
        columns: all columns of the call, which None stands for; see `ChosenColumns`.
        embedded_positions: what shortformer positions add to what queries and keys read, as listeners leave it; None
            where the call does not begin with the network: then it is the table's.
    """

    columns = None
    embedded_positions: Float[Tensor, "batch pos d_model"] | None = None
    # Of a call on several devices: the plan on each of the others, and in these a way back, that keeps no cycle alive.
    _places: "dict[torch.device, TokenPlan] | None" = None
    _home: "weakref.ref[TokenPlan] | None" = None

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
        causal: bool = True,
        document_mask: bool = True,
    ) -> None:
        self.batch, self.n_new, self.n_past, self.n_keys = batch, n_new, n_past, n_past + n_new
        self.device = device
        self.phase: Phase = phase
        self.attention_mask, self.past_mask = attention_mask, past_mask
        self.key_mask = self._join_masks(attention_mask, past_mask)
        self.given_positions = positions
        self.causal, self.document_mask = causal, document_mask
        self.documents: DocumentColumns | None = None
        self._seen: dict[Reach, Visibility] = {}
        self._sights: dict[tuple[Reach, torch.dtype], Sight] = {}
        self._made: dict[Hashable, object] = {}

    def on(self, device: torch.device) -> "TokenPlan":
        """The plan on a device, for the blocks that run there; made once per call and device."""
        if device == self.device:
            return self
        home = self if self._home is None else self._home()
        if home is None or home is self:
            return self._find_moved(device)
        return home if device == home.device else home._find_moved(device)

    def _find_moved(self, device: torch.device) -> "TokenPlan":
        if self._places is None:
            self._places = {}
        if device not in self._places:
            self._places[device] = self._move(device)
        return self._places[device]

    def _move(self, device: torch.device) -> "TokenPlan":
        moved = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device))
            elif isinstance(value, TokenPlan | DocumentColumns):
                setattr(moved, name, value.on(device))
        moved.device, moved._places = device, None
        moved._home = weakref.ref(self)
        moved._seen, moved._sights = {}, {}
        # Plain numbers, which a device was waited for, hold on every device.
        moved._made = {key: made for key, made in self._made.items() if isinstance(made, int)}
        return moved

    def take_rows(self, rows: Tensor) -> "TokenPlan":
        """The plan of some of its rows, by number."""

        def take(tensor: Tensor | None) -> Tensor | None:
            # One row stands for all.
            return tensor if tensor is None or (len(tensor) == 1 and self.batch > 1) else tensor[rows]

        taken = copy(self)
        taken.batch = len(rows)
        taken.attention_mask, taken.key_mask = take(self.attention_mask), take(self.key_mask)
        taken.past_mask, taken.given_positions = take(self.past_mask), take(self.given_positions)
        taken.embedded_positions = take(self.embedded_positions)
        if self.documents is not None:
            ids = take(self.documents.ids)
            assert ids is not None
            taken.documents = replace(self.documents, ids=ids, key_mask=take(self.documents.key_mask))
        taken._places = taken._home = None
        taken._seen, taken._sights, taken._made = {}, {}, {}
        return taken

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
    def n_run(self) -> int:
        """Columns of the call."""
        return self.n_new

    @property
    def positions_by_column(self) -> range | None:
        """`token_index` of every row in plain numbers; None where rows differ."""
        return range(self.n_past, self.n_keys) if self.key_mask is None else None

    @property
    def length(self) -> int:
        """`n_tokens` of every row, where all columns are tokens."""
        return self.n_keys

    @property
    def token_index(self) -> Int[Tensor, "batch pos"]:
        """The position of each column's token in its row's sequence, counted over real tokens; -1 for padding."""
        return self.remember("token_index", self._count_tokens)

    def _count_tokens(self) -> Tensor:
        if self.key_mask is None:
            return torch.arange(self.n_past, self.n_keys, device=self.device).expand(self.batch, -1)
        return (self.key_mask.cumsum(1) - 1).masked_fill(~self.key_mask, -1)[:, self.n_past :]

    @property
    def n_tokens(self) -> Int[Tensor, " batch"]:
        """Real tokens of each row so far, those in the cache included."""
        if self.key_mask is None:
            return torch.full((self.batch,), self.n_keys, device=self.device)
        return self.key_mask.sum(1)

    @property
    def positions(self) -> Int[Tensor, "rows pos"]:
        """The position of each column, one row where all rows agree; padding stands at position 0."""
        if self.given_positions is not None:
            return self.given_positions
        if self.counts_within_documents:
            return self.document_positions[:, self.n_past :]
        if self.key_mask is None:
            return torch.arange(self.n_past, self.n_keys, device=self.device)[None]
        return self.token_index.clamp(min=0)

    @property
    def key_positions(self) -> Int[Tensor, "rows key"]:
        """The position of each key; padding stands at position 0."""
        return self.remember("key_positions", self._place_keys)

    def _place_keys(self) -> Tensor:
        if self.given_positions is not None and not self.n_past:
            return self.given_positions
        if self.counts_within_documents:
            return self.document_positions
        if self.key_mask is None:
            return torch.arange(self.n_keys, device=self.device)[None]
        return (self.key_mask.cumsum(1) - 1).clamp(min=0) * self.key_mask

    @property
    def n_positions(self) -> int:
        """A bound on the positions of this call: all are below it."""
        if self.given_positions is None:
            return self.n_keys
        return self.remember("n_positions", lambda: int(self.positions.max()) + 1)

    @property
    def counts_within_documents(self) -> bool:
        """Whether positions start anew in each document of a row."""
        return self.given_positions is None and self.documents is not None and self.documents.restarts

    @property
    def longest(self) -> int:
        """A bound on the length of sequences, which documents make shorter than rows: looked at where they do."""
        if not self.counts_within_documents:
            return self.n_positions
        return self.remember("longest", lambda: int(self.document_lengths.max()))

    @property
    def is_contiguous(self) -> bool:
        """Whether positions simply go on from the cache, 0, 1, 2, ... in every row."""
        return self.given_positions is None and self.key_mask is None and self.documents is None

    @property
    def starts_document(self) -> Bool[Tensor, "rows pos"] | None:
        """The columns of this call that hold the first token of a document; None where rows are one document each."""
        return None if self.documents is None else self.document_positions[:, self.n_past :] == 0

    @property
    def document_positions(self) -> Int[Tensor, "_ key"]:
        """The position of each key within its document; padding stands at position 0."""
        assert self.documents is not None
        return self.remember("document_positions", self.documents.count_positions)

    @property
    def document_lengths(self) -> Int[Tensor, "_ key"]:
        """The number of tokens of each key's document."""
        assert self.documents is not None
        return self.remember("document_lengths", self.documents.count_lengths)

    @property
    def past(self) -> range:
        """The keys in the cache."""
        return range(self.n_past)

    @property
    def new(self) -> range:
        """The keys of this call's tokens."""
        return range(self.n_past, self.n_keys)

    @property
    def keys(self) -> range:
        """All keys."""
        return range(self.n_keys)

    def rules(self, reach: Reach) -> tuple[Rule, ...]:
        """What hides keys from queries in a layer with such a reach."""
        rules = _CAUSAL if self.causal else _CAUSAL[1:]
        if self.documents is not None and self.document_mask:
            rules = (*rules, SameDocument())
        return rules if reach is None else (*rules, *reach_rules(reach, both_ways=not self.causal))

    def visibility(self, reach: Reach) -> Visibility:
        """What queries see in a layer with such a reach; made once per call."""
        if reach not in self._seen:
            self._seen[reach] = Visibility(self, self.rules(reach))
        return self._seen[reach]

    def sight(self, reach: Reach, dtype: torch.dtype) -> Sight:
        """How attention is told what queries see of all keys, in a layer with such a reach."""
        asked = (reach, dtype)
        sight = self._sights.get(asked)
        if sight is None:
            sight = self._sights[asked] = self.visibility(reach).sight(self.keys, dtype)
        return sight

    def remember(self, key: Hashable, make: Callable[..., Made], *arguments: Any) -> Made:
        """What `make(*arguments)` gives, made once per call: what is the same for several layers."""
        made: Made | None = self._made.get(key)  # type: ignore[assignment]
        if made is None:
            made = self._made[key] = make(*arguments)
        return made

    def choose_columns(self, wanted: LogitsAt) -> "ChosenColumns":
        """The columns that hold the wanted positions of each row.

        Args:
            wanted: positions among the real tokens of this call, per row; negative ones count from its last
                real token. An int keeps the axis, with size 1.

        Raises:
            InputError: a position outside a row, no position, a slice that runs backwards, or one that selects
                different numbers of tokens.
        """
        index = read_choice(wanted, what="logits_at")
        if isinstance(index, slice) and index.step is not None and index.step < 1:
            raise InputError(f"logits_at: {wanted!r} runs backwards; give a list of positions")
        if self.attention_mask is None:
            chosen = resolve_choice(index, self.n_new, what="logits_at", noun="positions run in this call")
            if not chosen:
                raise InputError(f"logits_at={wanted!r} selects none of the {self.n_new} positions run in this call")
            return ChosenColumns(self, chosen)
        rows = []
        for row, mask in enumerate(self.attention_mask):
            real = mask.nonzero()[:, 0]
            places = resolve_choice(index, len(real), what=f"logits_at: row {row}", noun="real tokens")
            rows.append(real[places])
        if len({len(row) for row in rows}) > 1:
            raise InputError(
                f"logits_at: {wanted!r} selects different numbers of tokens in rows of lengths "
                f"{[int(n) for n in self.attention_mask.sum(1)]}; give positions that every row has"
            )
        columns = torch.stack(rows)
        if not columns.shape[1]:
            raise InputError(f"logits_at={wanted!r} selects no token")
        return ChosenColumns(self, columns)

    def choose_tokens(self, rows: Int[Tensor, " token"], columns: Int[Tensor, " token"]) -> "ChosenTokens":
        """Single tokens, as rows of one column each."""
        return ChosenTokens(self, rows, columns)


class ChosenColumns:
    """Some columns of a call, as the tokens of tensors that hold no others.

    Args:
        plan: of the call.
        columns: the same in every row, or `[batch chosen]`.

    Attributes:
        columns: as given.
        phase, n_tokens, length, n_run: the call's.
    """

    def __init__(self, plan: TokenPlan, columns: Sequence[int] | Int[Tensor, "batch chosen"]) -> None:
        self._plan = plan
        self.columns = columns
        self.phase: Phase = plan.phase
        self.length = plan.length
        self.n_run = plan.n_run

    def on(self, device: torch.device) -> "ChosenColumns":
        """The same columns on a device."""
        plan = self._plan.on(device)
        if plan is self._plan:
            return self
        return ChosenColumns(plan, self.columns.to(device) if isinstance(self.columns, Tensor) else self.columns)

    @property
    def n_tokens(self) -> Int[Tensor, " batch"]:
        """Real tokens of each row so far."""
        return self._plan.n_tokens

    @property
    def positions_by_column(self) -> list[int] | None:
        """The position that each column holds in every row; None where rows differ."""
        positions = self._plan.positions_by_column
        if positions is None or isinstance(self.columns, Tensor):
            return None
        return [positions[column] for column in self.columns]

    @property
    def token_index(self) -> Int[Tensor, "batch chosen"]:
        """The position of each column's token."""
        return self.take(self._plan.token_index)

    def take(self, tensor: Tensor) -> Tensor:
        """These columns of a tensor `[batch pos ...]`: a view where they are neighbours in every row."""
        columns = self.columns
        if isinstance(columns, Tensor):
            index = columns.view(*columns.shape, *[1] * (tensor.ndim - 2))
            return tensor.take_along_dim(index, dim=1)
        if list(columns) == list(range(columns[0], columns[0] + len(columns))):
            return tensor[:, columns[0] : columns[0] + len(columns)]
        return tensor.index_select(1, torch.tensor(columns, device=tensor.device))


class ChosenTokens:
    """Single tokens of a call, as the tokens of tensors `[token 1 ...]`.

    Args:
        plan: of the call.
        rows: the row of each.
        columns: the column of each.

    Attributes:
        columns: `[token 1]`.
        phase, length, n_run: the call's.
    """

    positions_by_column = None

    def __init__(self, plan: TokenPlan, rows: Int[Tensor, " token"], columns: Int[Tensor, " token"]) -> None:
        self._plan, self._rows = plan, rows
        self.columns = columns[:, None]
        self.phase: Phase = plan.phase
        self.length = plan.length
        self.n_run = plan.n_run

    @property
    def token_index(self) -> Int[Tensor, "token one"]:
        """The position of each token."""
        return self._plan.token_index[self._rows[:, None], self.columns]

    @property
    def n_tokens(self) -> Int[Tensor, " token"]:
        """Real tokens of each token's row."""
        return self._plan.n_tokens[self._rows]


def check_attention_mask(mask: object, batch: int, n_new: int, n_past: int) -> Bool[Tensor, "batch pos"] | None:
    """The mask as booleans, or None when it hides nothing.

    Raises:
        InputError: another shape than the input's, or values other than 0 and 1.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise InputError(f"attention_mask is a {type(mask).__name__}; expected a tensor [{batch}, {n_new}] of 0 and 1")
    if tuple(mask.shape) != (batch, n_new):
        hint = f"; it covers the new tokens only, not the {n_past} in the cache" if n_past else ""
        raise InputError(f"attention_mask has shape {list(mask.shape)}; expected [{batch}, {n_new}]{hint}")
    if torch.compiler.is_compiling():
        # A traced call cannot look at values; a mask that hides nothing is one like any other.
        return mask.bool()
    if mask.dtype != torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise InputError("attention_mask holds values other than 0 (padding) and 1 (token)")
        mask = mask.bool()
    if bool(mask.all()):
        return None
    empty = (~mask).all(1).nonzero()[:, 0].tolist()
    if empty and not n_past:
        raise InputError(f"attention_mask hides every token of rows {empty}; leave empty rows out of the batch")
    return mask


def check_positions(positions: object, batch: int, n_new: int, n_ctx: int) -> Int[Tensor, "rows pos"] | None:
    """Positions as `[rows pos]`.

    Raises:
        InputError: another shape, no integers, or a position outside of `[0, n_ctx)`.
    """
    if positions is None:
        return None
    if not isinstance(positions, Tensor):
        raise InputError(f"positions are a {type(positions).__name__}; expected a tensor of integers")
    if positions.ndim == 1:
        positions = positions[None]
    is_whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
    if positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != n_new or not is_whole:
        raise InputError(
            f"positions are {list(positions.shape)} {positions.dtype}; expected integers [{n_new}] or "
            f"[{batch}, {n_new}]"
        )
    lowest, highest = (int(end) for end in torch.aminmax(positions))
    if lowest < 0 or highest >= n_ctx:
        found = lowest if lowest < 0 else highest
        raise InputError(f"positions hold {found}; expected numbers from 0 to {n_ctx - 1} (n_ctx={n_ctx})")
    return positions.long()
