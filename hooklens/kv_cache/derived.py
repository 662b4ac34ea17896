"""Caches made from a cache: copies, fewer columns or rows, more rows of the one, another device or dtype."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from hooklens.errors import CacheError
from hooklens.kv_cache.arguments import Rows, read_count, read_dtype, read_layer_devices, read_rows
from hooklens.kv_cache.entry import HookedKeyValueCacheEntry
from hooklens.kv_cache.fit import Origin
from hooklens.kv_cache.inference import lasting_tensors
from hooklens.kv_cache.mask import ColumnMask

Cache = TypeVar("Cache", bound="_Whole")


@runtime_checkable
class _Whole(Protocol):
    """The cache that has these methods."""

    entries: list[HookedKeyValueCacheEntry]
    fingerprint: str | None
    transforms: tuple[str, ...]
    adapters: tuple[str, ...]
    last_logits: Tensor | None

    @property
    def frozen(self) -> bool: ...

    @property
    def batch_size(self) -> int: ...

    def __len__(self) -> int: ...

    def check_consistent(self) -> None: ...

    def _derive(self: Cache, *changes: Any, **more: Any) -> Cache: ...

    def _derive_columns(self, derived: Any, mask: Any, ids: Any) -> None: ...

    def _hold(self, entries: Sequence[HookedKeyValueCacheEntry], origin: Origin) -> None: ...


class DerivedCaches:
    """The methods of a cache that give another one. What they share with it changes with neither."""

    def _derive(
        self: Cache,
        change: Callable[[Tensor], Tensor],
        mask: Callable[[ColumnMask], ColumnMask],
        logits: Callable[[Tensor], Tensor] | None,
        ids: Callable[[Tensor], Tensor] | None = None,
        by_layer: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Cache:
        """A cache of changed keys, values, mask and logits; ids and documents change as keys do, or as is said.

        With `by_layer` the keys and values of each layer change in a way of their own.
        """
        change_one = by_layer or (lambda tensor, layer: change(tensor))
        self.check_consistent()
        derived = type(self).__new__(type(self))
        with lasting_tensors():
            entries = [
                HookedKeyValueCacheEntry(
                    change_one(entry.past_keys, layer),
                    change_one(entry.past_values, layer),
                    self.frozen,
                    n_heads=entry.n_heads,
                )
                for layer, entry in enumerate(self.entries)
            ]
            self._derive_columns(derived, mask, ids or change)
            derived._hold(entries, Origin(self.fingerprint, self.transforms, self.adapters))
            last = self.last_logits
            if last is not None and logits is not None:
                derived.last_logits = logits(last)
        derived.check_consistent()
        return derived

    def clone(self: Cache) -> Cache:
        """A copy that shares nothing."""
        return self._derive(torch.clone, lambda mask: mask.same(mask.columns.clone()), torch.clone)

    def crop(self: Cache, n: int | np.integer[Any]) -> Cache:
        """A cache of the first `n` columns; this one stays as it is, and tensors are shared.

        Raises:
            CacheError: `n` is outside 0 to `len(cache)`, or no int.
        """
        n = read_count(n, what="crop: n", least=0, most=len(self))
        keeps_all = n == len(self)
        return self._derive(
            lambda tensor: tensor[:, :n],
            lambda mask: (mask.same if keeps_all else mask.part)(mask.columns[:, :n]),
            (lambda logits: logits) if keeps_all else None,
        )

    def select(self: Cache, rows: Rows) -> Cache:
        """A cache of some rows, in the order named; this one stays as it is.

        Args:
            rows: an int, a slice, or a list, array or tensor of ints; negative ones count from the end. A row may be
                named several times. A slice shares tensors, everything else copies.

        Raises:
            CacheError: a row is out of range, no row is named, or `rows` is a mask.
        """
        index = read_rows(rows, self.batch_size)

        def take(tensor: Tensor) -> Tensor:
            if isinstance(index, slice):
                return tensor[index]
            return tensor.index_select(0, torch.tensor(index, device=tensor.device))

        return self._derive(take, lambda mask: mask.part(take(mask.columns)), take)

    def expand(self: Cache, n: int | np.integer[Any]) -> Cache:
        """A cache of `n` rows, each the one row of this cache. Appending to it makes copies; reading does not.

        Raises:
            CacheError: this cache has more than one row, or `n` is no int of at least 1.
        """
        n = read_count(n, what="expand: n", least=1)
        if self.batch_size != 1:
            raise CacheError(f"only a cache of one row can be expanded; this one has {self.batch_size}")

        def widen(tensor: Tensor) -> Tensor:
            return tensor.expand(n, *tensor.shape[1:])

        return self._derive(widen, lambda mask: mask.same(widen(mask.columns)), widen)

    def to(
        self: Cache, device: torch.device | str | Sequence[torch.device] | None = None, dtype: torch.dtype | None = None
    ) -> Cache:
        """The cache on another device or in another floating dtype; what is there already is shared.

        Args:
            device: where it goes; None: it stays. For a model on several devices one for each layer,
                `model.layer_devices`.
            dtype: of keys and values; None: their own.

        Raises:
            CacheError: no such device, another number of devices than of layers, or no floating dtype.
        """
        places, kind = read_layer_devices(device, len(self.entries)), read_dtype(dtype)

        def move(tensor: Tensor, layer: int = -1) -> Tensor:
            return tensor.to(device=places[layer], dtype=kind)

        def place_columns(tensor: Tensor) -> Tensor:
            return tensor.to(device=places[0])

        return self._derive(
            move, lambda mask: mask.same(place_columns(mask.columns)), move, place_columns, by_layer=move
        )
