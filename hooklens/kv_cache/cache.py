"""The entries of all layers with the mask of their tokens: what a model call takes as `past_kv_cache`."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.display import Displayed, Listing, Summary, format_bytes, merge_layers
from hooklens.errors import CacheError
from hooklens.kv_cache.arguments import (
    read_adapters,
    read_count,
    read_mask,
    read_transforms,
    require,
)
from hooklens.kv_cache.columns import ColumnRecord
from hooklens.kv_cache.derived import DerivedCaches
from hooklens.kv_cache.documents import ColumnDocuments, read_documents
from hooklens.kv_cache.entry import HookedKeyValueCacheEntry
from hooklens.kv_cache.fit import (
    Origin,
    check_batch,
    check_entries,
    check_model,
    check_origin,
    check_place,
    check_same_tokens,
    require_causal,
)
from hooklens.kv_cache.ids import read_token_ids
from hooklens.kv_cache.inference import lasting_tensors
from hooklens.kv_cache.mask import ColumnMask
from hooklens.kv_cache.storage import read_cache, write_cache


class HookedKeyValueCache(Displayed, DerivedCaches, ColumnRecord):
    """The entries of all layers, with the attention mask of the tokens they hold.

    A frozen cache never changes. Caches made from others (`crop`, `select`, `expand`, `to`) share memory with them
    until one of the two is appended to, which changes the other one in no way.

    Args:
        entries: one per layer, without heads for a layer without attention.
        previous_attention_mask: `[batch pos]`, which of the cached columns are real tokens. Its values are looked at
            once, see `has_padding`.
        frozen: freeze the entries: running a model on the cache leaves it as it is. False leaves them as they are.
        fingerprint: of the model's configuration, see `HookedConfig.fingerprint`; None: not checked.
        transforms: the weight-processing steps of the model that keys and values come from, `model.transforms`.
        document_ids: `[batch pos]`, int64, the document of each column; None: rows are one document each.
        restarts_positions: with `document_ids`, positions were counted within each document.
        token_ids: `[batch pos]`, the token in each column; None: not known.
        adapters: the names of the adapters beside the weights that acted, `model.active_adapters`.

    Attributes:
        entries: as above.
        fingerprint: as above.
        transforms: as above. A model that fills the cache writes its own record here; while the cache is empty,
            any model may.
        adapters: likewise.

    Raises:
        CacheError: entries of different lengths, rows or frozenness, or a mask or documents that do not fit them.
    """

    def __init__(
        self,
        entries: Sequence[HookedKeyValueCacheEntry],
        previous_attention_mask: Bool[Tensor, "batch pos"],
        frozen: bool = False,  # noqa: FBT001, FBT002
        *,
        fingerprint: str | None = None,
        transforms: tuple[str, ...] = (),
        document_ids: Int[Tensor, "batch pos"] | None = None,
        restarts_positions: bool = True,
        token_ids: Int[Tensor, "batch pos"] | None = None,
        adapters: tuple[str, ...] = (),
    ) -> None:
        require(entries, (list, tuple), what="entries", expected="a list of HookedKeyValueCacheEntry, one per layer")
        require(frozen, bool, what="frozen", expected="True or False")
        require(fingerprint, (str, type(None)), what="fingerprint", expected="cfg.fingerprint or None")
        mask = ColumnMask(read_mask(previous_attention_mask, what="previous_attention_mask"))
        documents = read_documents(document_ids, restarts_positions, columns=mask.columns.shape)
        super().__init__(mask, documents)
        self._hold(entries, Origin(fingerprint, read_transforms(transforms), read_adapters(adapters)))
        self.token_ids = token_ids
        before = [entry.frozen for entry in self.entries]
        if frozen:
            self.freeze()
        try:
            self.check_consistent()
        except CacheError:
            for entry, was in zip(self.entries, before, strict=True):
                entry.frozen = was
            raise

    def _hold(self, entries: Sequence[HookedKeyValueCacheEntry], origin: Origin) -> None:
        check_entries(entries)
        self.entries = list(entries)
        self.fingerprint, self.transforms, self.adapters = origin
        self._logits: Float[Tensor, "batch d_vocab"] | None = None
        self._logits_length = 0

    @classmethod
    def init_cache(
        cls,
        cfg: HookedConfig,
        device: torch.device | str | None = None,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
    ) -> "HookedKeyValueCache":
        """An empty cache for any model of this config, however its weights were processed.

        Args:
            cfg: the network.
            device: where it lies; None: torch's default.
            batch_size: rows.
            dtype: of the empty tensors; None: torch's default. Keys and values keep their own, the model's.

        Raises:
            CacheError: an argument of the wrong kind, or a network that is not causal.
        """
        require(cfg, HookedConfig, what="cfg", expected="a HookedConfig, model.cfg")
        require_causal(cfg)
        entries = [
            HookedKeyValueCacheEntry.init_cache_entry(
                cfg, device, batch_size, dtype=dtype, has_attn=block.attn is not None, d_head_v=block.d_head_v
            )
            for block in cfg.blocks
        ]
        with lasting_tensors():
            mask = torch.empty(entries[0].batch_size, 0, dtype=torch.bool, device=entries[0].device)
        return cls(entries, mask, fingerprint=cfg.fingerprint)

    def __copy__(self) -> "HookedKeyValueCache":
        """A cache of the same tensors, which is appended to by itself."""
        return self.crop(len(self))

    @property
    def previous_attention_mask(self) -> Bool[Tensor, "batch pos"]:
        """Which of the cached columns are real tokens.

        Setting it looks at its values once.

        Raises:
            CacheError: on setting: the cache is frozen, or the mask does not fit the entries.
        """
        return self._mask.columns

    @previous_attention_mask.setter
    def previous_attention_mask(self, mask: Bool[Tensor, "batch pos"]) -> None:
        self._refuse_frozen("its mask cannot be set")
        before, self._mask = self._mask, ColumnMask(read_mask(mask, what="previous_attention_mask"))
        try:
            self.check_consistent()
        except CacheError:
            self._mask = before
            raise
        self._logits = None

    @property
    def last_logits(self) -> Float[Tensor, "batch d_vocab"] | None:
        """Logits at the last position, where `model.prefill` made the cache and its columns are the same since.

        Appending makes it None, and rolling back what was appended brings it back.

        Raises:
            CacheError: on setting: it has not one row of floats for each row of the cache.
        """
        length = self._logits_length
        holds = length == len(self) and all(length == len(entry) == entry.n_unchanged for entry in self.entries)
        return self._logits if holds else None

    @last_logits.setter
    def last_logits(self, logits: Float[Tensor, "batch d_vocab"] | None) -> None:
        if logits is not None:
            require(logits, Tensor, what="last_logits", expected="a tensor [batch d_vocab] or None")
            if logits.ndim != 2 or logits.shape[0] != self.batch_size or not logits.is_floating_point():
                raise CacheError(
                    f"last_logits are {logits.dtype} {list(logits.shape)}; expected floats [{self.batch_size}, d_vocab]"
                )
            self.check_consistent()
        self._logits = logits
        self._logits_length = len(self)
        for entry in self.entries:
            entry.mark_unchanged()

    @property
    def frozen(self) -> bool:
        """Whether running a model on the cache leaves it as it is."""
        return self.entries[0].frozen

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the keys. The values' is the same, unless the cache was filled under `torch.autocast`."""
        holding = next((entry for entry in self.entries if entry.head_shape[0]), self.entries[0])
        return holding.dtypes[0]

    @property
    def device(self) -> torch.device:
        """Where keys and values lie; on several devices those of the first layer."""
        return self.entries[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values so far (buffers may hold room for more)."""
        return sum(entry.nbytes for entry in self.entries)

    def _summary(self) -> Summary:
        state = "frozen, " if self.frozen else ""
        kinds = merge_layers((f"blocks.{layer}", entry.describe()) for layer, entry in enumerate(self.entries))
        rows = [
            (name, *shapes, format_bytes(size) if n == 1 else f"{n:,} x {format_bytes(size)}")
            for name, (*shapes, size), n in kinds
        ]
        return Summary(
            title=(
                f"HookedKeyValueCache({state}{len(self.entries)} layers, batch={self.batch_size}, pos={len(self)}, "
                f"{format_bytes(self.nbytes)})"
            ),
            facts={
                "padding": "some columns are padding" if self.has_padding else None,
                "documents": None if self._documents is None else "columns have document ids",
                "tokens": None if len(self) == 0 or self.token_ids is not None else "ids are not known",
                "transforms": ", ".join(self.transforms) or None,
                "adapters": ", ".join(self.adapters) or None,
                "device": str(self.device),
            },
            listing=Listing(
                columns=("layers", "keys [batch pos kv_head d_head]", "values", "dtype", "bytes"),
                rows=rows,
                what="kinds of layers",
                more="kv.entries has all",
            ),
        )

    def freeze(self) -> "HookedKeyValueCache":
        """Make the cache an immutable value; returns it."""
        for entry in self.entries:
            entry.frozen = True
        return self

    def unfreeze(self) -> "HookedKeyValueCache":
        """Let calls append again; returns the cache."""
        for entry in self.entries:
            entry.frozen = False
        return self

    @contextmanager
    def frozen_context(self) -> Iterator["HookedKeyValueCache"]:
        """Frozen inside the `with` block, as it was before after it."""
        before = [(entry, entry.frozen) for entry in self.entries]
        self.freeze()
        try:
            yield self
        finally:
            for entry, frozen in before:
                entry.frozen = frozen

    def _refuse_frozen(self, what: str) -> None:
        if any(entry.frozen for entry in self.entries):
            raise CacheError(
                f"the cache is frozen: {what}. Take a part of it, cache.crop(n), which shares memory, or unfreeze it"
            )

    def check_consistent(self) -> None:
        """Check that all layers hold the same tokens, and are all frozen or none.

        Raises:
            CacheError: they do not; the layers are named.
        """
        check_same_tokens(self.entries, self._mask.columns)
        self.check_columns()

    def append_attention_mask(
        self,
        mask_of_new_tokens: Bool[Tensor, "batch new"],
        *,
        all_tokens: bool | None = None,
        documents: ColumnDocuments | None = None,
        token_ids: Int[Tensor, "batch new"] | None = None,
    ) -> Bool[Tensor, "batch key"]:
        """The mask over past + new columns; stored, too, unless the cache is frozen.

        Args:
            mask_of_new_tokens: which of the new columns are real tokens.
            all_tokens: whether all of them are, where the caller knows it. None: looked up, which waits for the
                device.
            documents: of past + new columns. None: the new ones go on with the last document of the past, if it has
                documents.
            token_ids: the tokens in the new columns. None: not known, and `token_ids` is None from here on.

        Raises:
            CacheError: rows that the cache does not have, no mask, ids that are not those of its columns, or documents
                of other columns.
        """
        require(all_tokens, (bool, type(None)), what="all_tokens", expected="True, False or None")
        require(documents, (ColumnDocuments, type(None)), what="documents", expected="ColumnDocuments or None")
        new = read_mask(mask_of_new_tokens, what="mask_of_new_tokens")
        if new.shape[0] != self.batch_size and not (self.frozen and self.batch_size == 1):
            raise CacheError(
                f"the mask of the new tokens has {new.shape[0]} rows, the cache {self.batch_size}; only a frozen cache "
                "with one row serves another number of rows"
            )
        ids = None
        if token_ids is not None:
            ids = read_token_ids(token_ids, batch=new.shape[0], n_columns=new.shape[1])
        if self.frozen:
            # What is not stored need not be looked at.
            return self._mask.join(new, all_tokens=False).columns
        self._append_columns(new, all_tokens, documents, ids)
        return self._mask.columns

    def roll_back(self, n_columns: int) -> None:
        """Forget what a call that failed half-way has stored. Caches made from this one keep it.

        Raises:
            CacheError: the cache is frozen, or `n_columns` is outside 0 to `len(cache)`.
        """
        self._refuse_frozen("it cannot be rolled back")
        n = read_count(n_columns, what="roll_back: n_columns", least=0, most=len(self))
        short = [layer for layer, entry in enumerate(self.entries) if len(entry) < n]
        if short:
            raise CacheError(f"cannot roll back to {n} columns: layers {short} hold fewer")
        for entry in self.entries:
            entry.roll_back(n)
        self._cut_columns(n)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file. A file that is there is replaced in one step, or stays as it is.

        Raises:
            CacheError: the file cannot be written.
        """
        self.check_consistent()
        write_cache(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> "HookedKeyValueCache":
        """Read what `save` wrote. A file without a record of weight processing or adapters counts as that of a model
        without them; from one without token ids, which tokens it holds is not known. For a model on several devices:
        `HookedKeyValueCache.load(path).to(model.layer_devices)`.

        Raises:
            CacheError: the file is missing, damaged, or not a key-value cache.
        """
        return read_cache(path, cls, device=device)

    def check_fits(
        self,
        cfg: HookedConfig,
        *,
        transforms: tuple[str, ...],
        device: torch.device | tuple[torch.device, ...],
        dtype: torch.dtype,
        batch: int,
        adapters: tuple[str, ...] = (),
    ) -> None:
        """Check that a model can run `batch` rows on this cache; nothing is read from the device.

        Args:
            cfg: the model's.
            transforms: the model's record of weight processing. It must be equal to the cache's, although some steps
                leave keys and values as they are.
            device: the model's, or one for each layer.
            dtype: of the model's weights. Under `torch.autocast` the call computes in another one, which is asked for
                here. An empty cache takes any.
            batch: rows of the call.
            adapters: the names of the adapters beside the weights that act, in their order, `model.active_adapters`.

        Raises:
            CacheError: another model's, another record, other adapters, another device or dtype, rows that it cannot
                serve, or a network that is not causal.
        """
        require(batch, (int, np.integer, torch.SymInt), what="batch", expected="the number of rows")
        # Before every decoding step: entries that are alike, as they nearly always are, are checked as one.
        form = self.entries[0].form
        alike = all(entry.form == form for entry in self.entries)
        entries = self.entries[:1] if alike else self.entries
        check_same_tokens(entries, self._mask.columns)
        check_model(entries, cfg, n_layers=len(self.entries))
        check_origin(
            Origin(self.fingerprint, self.transforms, self.adapters),
            Origin(cfg.fingerprint, read_transforms(transforms), read_adapters(adapters)),
            holds_tokens=len(self) > 0,
        )
        check_place(entries if isinstance(device, torch.device) else self.entries, device=device, dtype=dtype)
        check_batch(self.batch_size, batch, frozen=self.frozen)
