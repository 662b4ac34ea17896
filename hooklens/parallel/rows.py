"""Rows of a batch shared by several processes: data parallelism, of a network that each has or that they share.

Every process is given the whole batch and gives the whole result; each runs the blocks for its own rows. Where somebody
listens rows come together, and what listeners leave is taken apart again. Rows do not depend on each other, so where
they cannot be shared equally some processes run the last row beside others, and what they make of it is dropped.
"""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hooklens.hooks.call import Call, Listening
from hooklens.hooks.spread import Relay, tap_alike
from hooklens.kv_cache import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.parallel.spread import MeshSpread

if TYPE_CHECKING:
    from hooklens.hooks import HookPoint


class OwnRows(Relay):
    """The rows of one call that this process runs.

    Args:
        mesh: the processes that share them.
        batch: how many rows there are.
        device: where they lie.

    Attributes:
        index: the rows of this process.
    """

    def __init__(self, mesh: DeviceMesh, batch: int, device: torch.device) -> None:
        self._spread = MeshSpread(mesh)
        self.batch = batch
        each = -(-batch // self._spread.n_parts)
        self._n_run = each * self._spread.n_parts
        first = self._spread.part * each
        self.index: Int[Tensor, " row"] = torch.arange(first, first + each, device=device).clamp(max=batch - 1)

    def take(self, whole: Float[Tensor, "batch ..."]) -> Float[Tensor, "own ..."]:
        """This process's rows of what all processes have."""
        if self._n_run > self.batch:
            last = whole[-1:].expand(self._n_run - self.batch, *[-1] * (whole.ndim - 1))
            whole = torch.cat([whole, last])
        return self._spread.scatter(whole, 0)

    def gather(self, own: Float[Tensor, "own ..."]) -> Float[Tensor, "batch ..."]:
        """All rows, of those of each process."""
        whole = self._spread.gather(own, 0)
        return whole if self._n_run == self.batch else whole[: self.batch].clone()

    def fire(self, point: "HookPoint", tensor: Tensor, call: Call, listening: Listening) -> tuple[Tensor, bool]:
        """Show listeners all rows: this process's of what they leave, and whether it differs."""
        left, changed = point.fire(self.gather(tensor), call, listening)
        return tap_alike(self.take(left), left), changed


class RowsOfCache:
    """A key-value cache that holds all rows in each process, for a call that runs some of them."""

    def __init__(self, cache: HookedKeyValueCache, rows: OwnRows) -> None:
        self.entries = [RowsOfEntry(entry, rows) for entry in cache.entries]


class RowsOfEntry:
    """One layer's keys and values, of which a call reads and makes some rows."""

    def __init__(self, entry: HookedKeyValueCacheEntry, rows: OwnRows) -> None:
        self._entry, self._rows = entry, rows

    @property
    def frozen(self) -> bool:
        """Whether what is appended is not kept."""
        return self._entry.frozen

    def __len__(self) -> int:
        return len(self._entry)

    @property
    def past_keys(self) -> Float[Tensor, "own pos kv_head d_head"]:
        """The keys so far; one row that serves all stays one."""
        own: Tensor = self._own(self._entry.past_keys)
        return own

    @property
    def past_values(self) -> Float[Tensor, "own pos kv_head d_head_v"]:
        """The values so far, likewise."""
        own: Tensor = self._own(self._entry.past_values)
        return own

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Past + new keys and values of these rows; all rows are stored, unless the entry is frozen."""
        if self.frozen:
            past = HookedKeyValueCacheEntry(self.past_keys, self.past_values, frozen=True)
            return past.append(keys, values)
        whole = self._entry.append(self._rows.gather(keys), self._rows.gather(values))
        return self._own(whole[0]), self._own(whole[1])

    def append_columns(self, n: int) -> None:
        """Count new tokens in a layer that holds nothing of them."""
        self._entry.append_columns(n)

    def hold_heads(self, begin: int, end: int) -> "RowsOfEntry":
        """The same with some heads only."""
        return RowsOfEntry(self._entry.hold_heads(begin, end), self._rows)

    def _own(self, whole: Tensor) -> Any:
        return whole if len(whole) == 1 and self._rows.batch > 1 else whole[self._rows.index]
