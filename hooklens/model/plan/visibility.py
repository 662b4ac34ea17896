"""What a query may see: a list of rules, and the mask they come to, made in one place.

Each rule hides some keys from some queries. `Visibility` asks the rules of a call about a range of keys and settles how
attention is told: not at all (every query sees every key), by the kernel's own causal flag, or by a term of the scores
that is -inf where a key is hidden. It keeps what it made, so a call makes each mask once, for all layers.

A new restriction is one more rule.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.model.attention.attend import additive_mask
from hooklens.model.plan.documents import DocumentColumns

Hidden = Bool[Tensor, "rows one query key"]


@runtime_checkable
class Sides(Protocol):
    """Queries and keys of a call: what rules ask about.

    The queries are the tokens that run, the keys are those in the cache followed by those that run.
    """

    n_past: int
    n_new: int
    device: torch.device
    given_positions: Int[Tensor, "rows pos"] | None

    past_mask: Bool[Tensor, "rows past"] | None
    attention_mask: Bool[Tensor, "batch new"] | None
    documents: DocumentColumns | None

    @property
    def key_mask(self) -> Bool[Tensor, "batch key"] | None:
        """Which keys are tokens; None: all."""
        ...

    @property
    def key_positions(self) -> Int[Tensor, "rows key"]:
        """The position of each key."""
        ...


@runtime_checkable
class Rule(Protocol):
    """Something that hides keys from queries."""

    def acts(self, sides: Sides, keys: range) -> bool:
        """Whether the rule can hide any of the keys; known without a look at a tensor."""
        ...

    def hide(self, sides: Sides, keys: range) -> Hidden:
        """True where a query may not see one of the keys."""
        ...


@dataclass(frozen=True)
class Causal:
    """No token sees a later one."""

    def acts(self, sides: Sides, keys: range) -> bool:
        """Among several tokens of the call."""
        return keys.stop > sides.n_past + 1 and sides.n_new > 1

    def hide(self, sides: Sides, keys: range) -> Hidden:
        """The later columns."""
        query = torch.arange(sides.n_past, sides.n_past + sides.n_new, device=sides.device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=sides.device)[None, :]
        return (key > query)[None, None]


@dataclass(frozen=True)
class Window:
    """A token sees the `size` latest positions only, its own included.

    Attributes:
        size: how many.
        both_ways: of the later positions as many: a token sees what is less than `size` positions away. For networks
            that are not causal.
    """

    size: int
    both_ways: bool = False

    def acts(self, sides: Sides, keys: range) -> bool:
        """Where one of the keys is further from the query at the other end, or positions do not count columns."""
        n_back = sides.n_past + sides.n_new - keys.start
        n_ahead = keys.stop - sides.n_past if self.both_ways else 0
        return self.size < max(n_back, n_ahead) or sides.given_positions is not None

    def hide(self, sides: Sides, keys: range) -> Hidden:
        """What lies too far off; padding between two tokens does not count as distance."""
        key = sides.key_positions[:, None, None, keys.start : keys.stop]
        query = sides.key_positions[:, None, sides.n_past :, None]
        too_early = key <= query - self.size
        return too_early | (key >= query + self.size) if self.both_ways else too_early


@dataclass(frozen=True)
class Chunk:
    """Positions come in chunks of `size`, and a token sees its own only.

    Attributes:
        size: of a chunk.
    """

    size: int

    def acts(self, sides: Sides, keys: range) -> bool:
        """Where the call has more keys than a chunk, or positions do not count columns."""
        return sides.n_past + sides.n_new > self.size or sides.given_positions is not None

    def hide(self, sides: Sides, keys: range) -> Hidden:
        """The keys of other chunks; padding is not counted."""
        chunk = sides.key_positions[:, None, None, :] // self.size
        return chunk[..., keys.start : keys.stop] != chunk[..., sides.n_past :].mT


Reach = int | Chunk | None
"""How far a query of a layer sees: the size of a window, a chunk, or (None) all of its row."""


def reach_rules(reach: Reach, *, both_ways: bool = False) -> tuple[Rule, ...]:
    """What hides the keys that are out of reach."""
    if reach is None:
        return ()
    return (reach,) if isinstance(reach, Chunk) else (Window(reach, both_ways=both_ways),)


@dataclass(frozen=True)
class SameDocument:
    """No token sees another document of its row."""

    def acts(self, sides: Sides, keys: range) -> bool:
        """Where there are documents, unless the keys and the queries are known to be of one."""
        documents = sides.documents
        return documents is not None and not (documents.goes_on and keys.start >= sides.n_past)

    def hide(self, sides: Sides, keys: range) -> Hidden:
        """The columns of other documents."""
        assert sides.documents is not None
        ids = sides.documents.ids
        return ids[:, None, sides.n_past :, None] != ids[:, None, None, keys.start : keys.stop]


@dataclass(frozen=True)
class Padding:
    """No token sees padding."""

    def acts(self, sides: Sides, keys: range) -> bool:
        """Where there is any among the keys."""
        in_past = sides.past_mask is not None and keys.start < sides.n_past
        return in_past or (sides.attention_mask is not None and keys.stop > sides.n_past)

    def hide(self, sides: Sides, keys: range) -> Hidden:
        """The columns that are no tokens; of a past that all rows share, once."""
        if keys.stop <= sides.n_past:
            assert sides.past_mask is not None
            return ~sides.past_mask[:, None, None, keys.start : keys.stop]
        assert sides.key_mask is not None
        return ~sides.key_mask[:, None, None, keys.start : keys.stop]


class Sight(NamedTuple):
    """How attention is told what queries see of some keys.

    Attributes:
        is_causal: "no token sees a later one" is all there is to hide, among the same tokens.
        mask: a term of the scores, -inf where a key is hidden, else 0; None: nothing more is hidden.
        can_hide_all: some query may see none of the keys.
    """

    is_causal: bool
    mask: Float[Tensor, "rows one some_query key"] | None
    can_hide_all: bool

    def folded(self, n_rows: int, n_query: int) -> "Sight":
        """The same where the queries of all rows stand one after another, as those of one row."""
        # What hides the same from all queries of all rows needs no copies.
        if self.mask is None or (self.mask.shape[0] == 1 and self.mask.shape[2] == 1):
            return self
        mask = self.mask.expand(n_rows, 1, n_query, -1).reshape(1, 1, n_rows * n_query, self.mask.shape[-1])
        return self._replace(mask=mask)


class Visibility:
    """What the queries of a call see under some rules.

    Args:
        sides: queries and keys.
        rules: what hides keys.
    """

    def __init__(self, sides: Sides, rules: tuple[Rule, ...]) -> None:
        self._sides = sides
        self._rules = rules
        self._sights: dict[tuple[range, torch.dtype, bool, int | None], Sight] = {}

    def sight(self, keys: range, dtype: torch.dtype, *, explicit: bool = False, fold_rows: int | None = None) -> Sight:
        """How attention is told about a range of keys.

        Args:
            keys: columns of past + new.
            dtype: of the scores.
            explicit: as a mask in any case, for scores that are computed one by one.
            fold_rows: the queries of so many rows stand one after another, as those of one row.
        """
        asked = (keys, dtype, explicit, fold_rows)
        if asked not in self._sights:
            if fold_rows is None:
                self._sights[asked] = self._make_sight(keys, dtype, explicit=explicit)
            else:
                whole = self.sight(keys, dtype, explicit=explicit)
                self._sights[asked] = whole.folded(fold_rows, self._sides.n_new)
        return self._sights[asked]

    def first_rows(self, n_rows: int) -> "FirstRows":
        """The same for the first rows of the batch."""
        return FirstRows(self, n_rows, self._sides.n_new)

    def _make_sight(self, keys: range, dtype: torch.dtype, *, explicit: bool) -> Sight:
        sides = self._sides
        acting = [rule for rule in self._rules if rule.acts(sides, keys)]
        if not acting:
            return Sight(is_causal=False, mask=None, can_hide_all=False)
        own = range(sides.n_past, sides.n_past + sides.n_new)
        if keys == own and not explicit and all(isinstance(rule, Causal) for rule in acting):
            return Sight(is_causal=True, mask=None, can_hide_all=False)
        hidden = acting[0].hide(sides, keys)
        for rule in acting[1:]:
            hidden = hidden | rule.hide(sides, keys)
        # A token sees itself, unless it is padding or its own column is not among the keys.
        can_hide_all = sides.key_mask is not None or keys.start > own.start or keys.stop < own.stop
        return Sight(is_causal=False, mask=additive_mask(hidden, dtype), can_hide_all=can_hide_all)


class FirstRows(Visibility):
    """What the first rows of a batch see.

    Args:
        whole: of the whole batch.
        n_rows: how many rows.
        n_query: queries of each.
    """

    def __init__(self, whole: Visibility, n_rows: int, n_query: int) -> None:
        self._whole, self._n_rows, self._n_query = whole, n_rows, n_query

    def sight(self, keys: range, dtype: torch.dtype, *, explicit: bool = False, fold_rows: int | None = None) -> Sight:
        """The whole batch's masks, their first rows."""
        sight = self._whole.sight(keys, dtype, explicit=explicit)
        if sight.mask is not None and sight.mask.shape[0] > 1:
            sight = sight._replace(mask=sight.mask[: self._n_rows])
        return sight if fold_rows is None else sight.folded(fold_rows, self._n_query)
