"""The entries of all layers with the mask of their tokens: what a model call takes as `past_kv_cache`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.errors import CacheError
from hooklens.kv_cache.entry import HookedKeyValueCacheEntry
from hooklens.kv_cache.storage import StoredCache, read_cache, write_cache


class HookedKeyValueCache:
    """The entries of all layers, with the attention mask of the tokens they hold.

    Args:
        entries: one per layer.
        previous_attention_mask: `[batch pos]`, which of the cached columns are real tokens.
        frozen: running a model on the cache leaves it as it is.
        fingerprint: of the model's configuration, see `HookedConfig.fingerprint`; None: not checked.
        transforms: the weight-processing steps of the model that keys and values come from, `model.transforms`.

    Attributes:
        last_logits: `[batch d_vocab]`, logits at the last position, where `model.prefill` made the cache.
        transforms: as above. A model that fills the cache writes its own record here; while the cache is empty,
            any model may.

    Raises:
        CacheError: entries of different lengths, rows or frozenness, or a mask that does not fit them.
    """

    last_logits: Float[Tensor, "batch d_vocab"] | None = None

    def __init__(
        self,
        entries: Sequence[HookedKeyValueCacheEntry],
        previous_attention_mask: Bool[Tensor, "batch pos"],
        frozen: bool = False,  # noqa: FBT001, FBT002
        *,
        fingerprint: str | None = None,
        transforms: tuple[str, ...] = (),
    ) -> None:
        if not entries:
            raise CacheError("a key-value cache needs at least one entry; use HookedKeyValueCache.init_cache(cfg)")
        self.entries = list(entries)
        self.previous_attention_mask = previous_attention_mask.bool()
        self._frozen = frozen
        self.fingerprint = fingerprint
        self.transforms = transforms
        for entry in self.entries:
            entry.frozen = entry.frozen or frozen
        self.check_consistent()

    @classmethod
    def init_cache(
        cls,
        cfg: HookedConfig,
        device: torch.device | str | None = None,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
    ) -> "HookedKeyValueCache":
        """An empty cache for any model of this config, however its weights were processed."""
        entries = [
            HookedKeyValueCacheEntry.init_cache_entry(cfg, device, batch_size, dtype=dtype) for _ in range(cfg.n_layers)
        ]
        mask = torch.empty(batch_size, 0, dtype=torch.bool, device=device)
        return cls(entries, mask, fingerprint=cfg.fingerprint)

    def __len__(self) -> int:
        """Columns so far, padding included."""
        return self.previous_attention_mask.shape[1]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self.previous_attention_mask.shape[0]

    @property
    def frozen(self) -> bool:
        """Whether running a model on the cache leaves it as it is."""
        return self._frozen

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.entries[0].past_keys.dtype

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self.entries[0].past_keys.device

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values so far (buffers may hold room for more)."""
        return sum(2 * entry.past_keys.nbytes for entry in self.entries)

    def __repr__(self) -> str:
        state = "frozen, " if self.frozen else ""
        return (
            f"HookedKeyValueCache({state}{len(self.entries)} layers, batch={self.batch_size}, pos={len(self)}, "
            f"{self.nbytes / 2**20:.2f} MiB)"
        )

    def freeze(self) -> "HookedKeyValueCache":
        """Make the cache an immutable value; returns it."""
        self._set_frozen(value=True)
        return self

    def unfreeze(self) -> "HookedKeyValueCache":
        """Let calls append again; returns the cache."""
        self._set_frozen(value=False)
        return self

    def _set_frozen(self, *, value: bool) -> None:
        self._frozen = value
        for entry in self.entries:
            entry.frozen = value

    @contextmanager
    def frozen_context(self) -> Iterator["HookedKeyValueCache"]:
        """Frozen inside the `with` block, as it was before after it."""
        before = self._frozen
        self._set_frozen(value=True)
        try:
            yield self
        finally:
            self._set_frozen(value=before)

    def check_consistent(self) -> None:
        """Check that all layers hold the same tokens, and are all frozen or none.

        Raises:
            CacheError: they do not; the layers are named.
        """
        odd = [layer for layer, entry in enumerate(self.entries) if entry.frozen != self._frozen]
        if odd:
            found, rest = ("not frozen", "frozen") if self._frozen else ("frozen", "not frozen")
            raise CacheError(
                f"the entries of layers {odd} are {found} and the rest of the cache is {rest}: after a call its layers "
                "would hold different tokens. Freeze or unfreeze the whole cache"
            )
        rows, columns = self.previous_attention_mask.shape
        odd = [layer for layer, entry in enumerate(self.entries) if (entry.batch_size, len(entry)) != (rows, columns)]
        if odd:
            held = [(self.entries[layer].batch_size, len(self.entries[layer])) for layer in odd]
            raise CacheError(
                f"the attention mask covers {rows} rows of {columns} columns, but layers {odd} hold (rows, columns) "
                f"{held}; every layer must hold the same tokens"
            )

    def append_attention_mask(self, mask_of_new_tokens: Bool[Tensor, "batch new"]) -> Bool[Tensor, "batch key"]:
        """The mask over past + new columns; stored, too, unless the cache is frozen."""
        new = mask_of_new_tokens.to(device=self.previous_attention_mask.device, dtype=torch.bool)
        past = self.previous_attention_mask
        if new.shape[0] != past.shape[0] and not (self.frozen and past.shape[0] == 1):
            raise CacheError(
                f"the mask of the new tokens has {new.shape[0]} rows, the cache {past.shape[0]}; only a frozen cache "
                "with one row serves another number of rows"
            )
        joined = torch.cat([past.expand(new.shape[0], -1), new], dim=1)
        if not self.frozen:
            self.previous_attention_mask = joined
        return joined

    def roll_back(self, n_columns: int) -> None:
        """Forget what a call that failed half-way has stored."""
        for entry in self.entries:
            entry.roll_back(n_columns)
        self.previous_attention_mask = self.previous_attention_mask[:, :n_columns]

    def _derive(
        self, entries: list[HookedKeyValueCacheEntry], mask: Tensor, last_logits: Tensor | None
    ) -> "HookedKeyValueCache":
        derived = HookedKeyValueCache(
            entries, mask, self._frozen, fingerprint=self.fingerprint, transforms=self.transforms
        )
        derived.last_logits = last_logits
        return derived

    def clone(self) -> "HookedKeyValueCache":
        """A copy that shares nothing."""
        entries = [
            HookedKeyValueCacheEntry(entry.past_keys.clone(), entry.past_values.clone(), self._frozen)
            for entry in self.entries
        ]
        logits = None if self.last_logits is None else self.last_logits.clone()
        return self._derive(entries, self.previous_attention_mask.clone(), logits)

    def crop(self, n: int) -> "HookedKeyValueCache":
        """A cache of the first `n` columns; this one stays as it is, and tensors are shared.

        Raises:
            CacheError: `n` is outside 0 to `len(cache)`.
        """
        if not 0 <= n <= len(self):
            raise CacheError(f"cannot crop a cache of {len(self)} columns to {n}; expected 0 to {len(self)}")
        entries = [
            HookedKeyValueCacheEntry(entry.past_keys[:, :n], entry.past_values[:, :n], self._frozen)
            for entry in self.entries
        ]
        return self._derive(entries, self.previous_attention_mask[:, :n], self.last_logits if n == len(self) else None)

    def select(self, rows: Sequence[int] | Tensor | slice) -> "HookedKeyValueCache":
        """A cache of some rows, by index, slice or boolean mask; this one stays as it is.

        Raises:
            CacheError: a row is out of range.
        """
        if isinstance(rows, slice | Tensor):
            index = rows
        else:
            is_mask = len(rows) > 0 and all(isinstance(row, bool) for row in rows)
            index = torch.as_tensor(list(rows), dtype=torch.bool if is_mask else torch.long)
        try:
            mask = self.previous_attention_mask[index]
            entries = [
                HookedKeyValueCacheEntry(entry.past_keys[index], entry.past_values[index], self._frozen)
                for entry in self.entries
            ]
        except IndexError as error:
            raise CacheError(f"rows {rows!r} do not fit a cache of {self.batch_size} rows: {error}") from None
        return self._derive(entries, mask, None if self.last_logits is None else self.last_logits[index])

    def expand(self, n: int) -> "HookedKeyValueCache":
        """A cache of `n` rows, each the one row of this cache. Appending to it makes copies; reading does not.

        Raises:
            CacheError: this cache has more than one row.
        """
        if self.batch_size != 1:
            raise CacheError(f"only a cache of one row can be expanded; this one has {self.batch_size}")
        entries = [
            HookedKeyValueCacheEntry(
                entry.past_keys.expand(n, -1, -1, -1), entry.past_values.expand(n, -1, -1, -1), self._frozen
            )
            for entry in self.entries
        ]
        logits = None if self.last_logits is None else self.last_logits.expand(n, -1)
        return self._derive(entries, self.previous_attention_mask.expand(n, -1), logits)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "HookedKeyValueCache":
        """The cache on another device or in another floating dtype."""
        entries = [
            HookedKeyValueCacheEntry(
                entry.past_keys.to(device=device, dtype=dtype),
                entry.past_values.to(device=device, dtype=dtype),
                self._frozen,
            )
            for entry in self.entries
        ]
        logits = None if self.last_logits is None else self.last_logits.to(device=device, dtype=dtype)
        return self._derive(entries, self.previous_attention_mask.to(device=device), logits)

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file.

        Raises:
            CacheError: the file cannot be written.
        """
        stored = StoredCache(
            keys=[entry.past_keys for entry in self.entries],
            values=[entry.past_values for entry in self.entries],
            attention_mask=self.previous_attention_mask,
            last_logits=self.last_logits,
            frozen=self._frozen,
            fingerprint=self.fingerprint,
            transforms=self.transforms,
        )
        write_cache(path, stored)

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> "HookedKeyValueCache":
        """Read what `save` wrote. A file without a record of weight processing counts as an unprocessed model's.

        Raises:
            CacheError: the file is missing, damaged, or not a key-value cache.
        """
        stored = read_cache(path, device=device)
        pairs = zip(stored.keys, stored.values, strict=True)
        cache = cls(
            [HookedKeyValueCacheEntry(keys, values, stored.frozen) for keys, values in pairs],
            stored.attention_mask,
            stored.frozen,
            fingerprint=stored.fingerprint,
            transforms=stored.transforms,
        )
        cache.last_logits = stored.last_logits
        return cache

    def check_fits(
        self,
        cfg: HookedConfig,
        *,
        transforms: tuple[str, ...],
        device: torch.device,
        dtype: torch.dtype,
        batch: int,
    ) -> None:
        """Check that a model can run `batch` rows on this cache.

        The records of weight processing must be equal, although some steps leave keys and values as they are.

        Raises:
            CacheError: another model's, another record, device or dtype, or rows that it cannot serve.
        """
        self.check_consistent()
        keys = self.entries[0].past_keys
        found = (len(self.entries), keys.shape[2], keys.shape[3])
        wanted = (cfg.n_layers, cfg.n_kv_heads, cfg.d_head)
        if found != wanted:
            raise CacheError(
                f"the cache has (layers, key-value heads, d_head) {found}, the model {wanted}: it was made by another "
                "model; make one with model.prefill(prefix)"
            )
        # Before the fingerprint: processing may change the config, too, and is then what there is to tell.
        if len(self) and self.transforms != transforms:
            raise CacheError(
                f"the cache was filled by a model with weight processing {_describe_record(self.transforms)}, the "
                f"weight processing of this model is {_describe_record(transforms)}: their keys and values do not go "
                "together. Make a cache with this model's model.prefill(prefix), or call the model that filled it"
            )
        if self.fingerprint is not None and self.fingerprint != cfg.fingerprint:
            raise CacheError(
                "the cache was made by a model with another configuration (their fingerprints differ); "
                "make one with model.prefill(prefix)"
            )
        if (self.dtype, self.device) != (dtype, device):
            raise CacheError(
                f"the cache is {self.dtype} on {self.device}, the model {dtype} on {device}; "
                "convert it with cache.to(device, dtype)"
            )
        if batch != self.batch_size and not (self.frozen and self.batch_size == 1):
            way_out = "freeze it: a frozen cache of one row serves any batch" if self.batch_size == 1 else "use select"
            raise CacheError(f"the cache has {self.batch_size} rows and the input {batch}; {way_out}")


def _describe_record(transforms: tuple[str, ...]) -> str:
    return " + ".join(transforms) or "none"
