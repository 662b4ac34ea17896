"""One layer's past keys and values, to append to or to read from."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.display import Displayed, Summary, format_bytes, format_shape
from hooklens.errors import CacheError
from hooklens.kv_cache.arguments import read_count, read_device, read_dtype, require
from hooklens.kv_cache.inference import lasting_tensors


class _Held(NamedTuple):
    """Buffers and how much of them is filled: one value, so that no interrupt finds them at odds."""

    keys: Tensor
    values: Tensor
    length: int


class HookedKeyValueCacheEntry(Displayed):
    """One layer's past keys and values.

    Buffers grow by doubling, so n appends move O(n) bytes in all. Appending writes only to columns that nobody has
    been shown: an entry made of other tensors, and one that was rolled back, copies what it holds first. So views
    (`past_keys`, what `append` gave, cropped caches) keep their contents.

    Args:
        past_keys: `[batch pos n_kv_heads d_head]`.
        past_values: the same device, and the same shape but for the width of heads, which latent attention has two of.
            Under `torch.autocast` the dtypes of keys and values may differ (rotary embeddings leave float32): each
            keeps its own.
        frozen: appending stores nothing.
        n_heads: key-value heads of the layer, where other processes hold more of them; None: these are all.

    Raises:
        CacheError: keys and values do not go together.
    """

    def __init__(
        self,
        past_keys: Float[Tensor, "batch pos kv_head d_head"],
        past_values: Float[Tensor, "batch pos kv_head d_head_v"],
        frozen: bool = False,  # noqa: FBT001, FBT002
        *,
        n_heads: int | None = None,
    ) -> None:
        for what, tensor in (("past_keys", past_keys), ("past_values", past_values)):
            _check_heads(tensor, what)
        require(frozen, bool, what="frozen", expected="True or False")
        if (past_keys.shape[:3], past_keys.device) != (past_values.shape[:3], past_values.device):
            raise CacheError(
                f"past keys are {_describe(past_keys)}, past values {_describe(past_values)}; "
                "expected the same shape and device"
            )
        self._held = _Held(past_keys, past_values, past_keys.shape[1])
        self._n_unchanged = 0
        self.frozen = frozen
        held = past_keys.shape[2]
        self.n_heads = held if n_heads is None else read_count(n_heads, what="n_heads", least=held)

    @classmethod
    def init_cache_entry(
        cls,
        cfg: HookedConfig,
        device: torch.device | str | None = None,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
        has_attn: bool = True,
        d_head_v: int | None = None,
    ) -> "HookedKeyValueCacheEntry":
        """An empty entry for one layer of a model. It takes dtypes and device of the first keys and values it is given.

        Args:
            cfg: the model's.
            device: where it lies.
            batch_size: rows.
            dtype: of what is empty.
            has_attn: whether the layer has attention; without, the entry has no heads and holds only how many tokens
                there were.
            d_head_v: the width of values, where it is not that of keys. None: it is.

        Raises:
            CacheError: an argument of the wrong kind.
        """
        require(cfg, HookedConfig, what="cfg", expected="a HookedConfig, model.cfg")
        require(has_attn, bool, what="has_attn", expected="True or False")
        n_kv_heads = cfg.n_kv_heads if has_attn else 0
        shape = (read_count(batch_size, what="batch_size", least=1), 0, n_kv_heads)
        width = cfg.d_head if d_head_v is None else read_count(d_head_v, what="d_head_v", least=1)
        with lasting_tensors():
            keys, values = (
                torch.empty((*shape, size), device=read_device(device), dtype=read_dtype(dtype))
                for size in (cfg.d_head, width)
            )
        return cls(keys, values)

    @property
    def past_keys(self) -> Float[Tensor, "batch pos kv_head d_head"]:
        """The keys so far, after rotary."""
        held = self._readable()
        return held.keys[:, : held.length]

    @property
    def past_values(self) -> Float[Tensor, "batch pos kv_head d_head_v"]:
        """The values so far."""
        held = self._readable()
        return held.values[:, : held.length]

    def __len__(self) -> int:
        return self._held.length

    def __copy__(self) -> "HookedKeyValueCacheEntry":
        """An entry of views: two that share a buffer's spare room would write over each other's columns."""
        return HookedKeyValueCacheEntry(self.past_keys, self.past_values, self.frozen, n_heads=self.n_heads)

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._held.keys.shape[0]

    @property
    def head_shape(self) -> tuple[int, int, int]:
        """Key-value heads, those of other processes included, and the widths of keys and values."""
        return self.n_heads, self._held.keys.shape[3], self._held.values.shape[3]

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self._held.keys.device

    @property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of the keys, and of the values."""
        return self._held.keys.dtype, self._held.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values so far (buffers may hold room for more)."""
        keys, values, length = self._held
        return sum(part.shape[0] * length * part.shape[2:].numel() * part.element_size() for part in (keys, values))

    def describe(self) -> tuple[str, str, str, int]:
        """The shapes of keys and of values, their dtypes, and their bytes, for displays: nothing is read or copied."""
        keys, values, length = self._held
        of_keys, of_values = (format_shape((part.shape[0], length, *part.shape[2:])) for part in (keys, values))
        dtypes = dict.fromkeys(str(part.dtype).removeprefix("torch.") for part in (keys, values))
        return of_keys, of_values, ", ".join(dtypes), self.nbytes

    def _summary(self) -> Summary:
        keys, values, dtypes, size = self.describe()
        state = "frozen, " if self.frozen else ""
        return Summary(
            title=f"HookedKeyValueCacheEntry({state}{keys}, {dtypes}, {format_bytes(size)})",
            facts={
                "axes": "batch x pos x kv_head x d_head",
                "values": None if keys == values else values,
                "device": str(self.device),
            },
        )

    @property
    def form(self) -> tuple[object, ...]:
        """All that decides what the entry can be used with: equal for entries of the same tokens and the same kind."""
        keys, values, length = self._held
        shape = (keys.shape[0], keys.shape[2:], values.shape[3])
        return self.frozen, self.n_heads, length, *shape, keys.dtype, values.dtype, keys.device

    @property
    def n_unchanged(self) -> int:
        """How many leading columns are those of the last `mark_unchanged`."""
        return self._n_unchanged

    def mark_unchanged(self) -> None:
        """Count from here on which columns stay as they are."""
        self._n_unchanged = len(self)

    def hold_heads(self, begin: int, end: int) -> "HookedKeyValueCacheEntry":
        """The entry with the keys and values of some heads only, as a process holds them that computes these.

        One that is not frozen changes: it holds no others from here on.

        Args:
            begin: the first of these heads.
            end: one past the last.

        Raises:
            CacheError: it holds others.
        """
        held = self._readable()
        if held.keys.shape[2] == end - begin:
            return self
        if held.keys.shape[2] != self.n_heads:
            raise CacheError(
                f"the entry holds {held.keys.shape[2]} of {self.n_heads} key-value heads, and heads {begin} to {end} "
                "are asked of it; make the cache with the model that reads it"
            )
        keys, values = (x[:, : held.length, begin:end] for x in (held.keys, held.values))
        if self.frozen:
            return HookedKeyValueCacheEntry(keys, values, frozen=True, n_heads=self.n_heads)
        # No spare room: others may see the buffers through views, so the next append copies.
        self._held = _Held(keys, values, held.length)
        return self

    def append_columns(self, n: int) -> None:
        """Count new tokens in a layer without attention, whose entry has 0 heads: columns that hold nothing."""
        nothing = (x.new_empty(x.shape[0], n, 0, x.shape[3]) for x in (self._held.keys, self._held.values))
        self.append(*nothing)

    def append(
        self,
        new_keys: Float[Tensor, "batch new kv_head d_head"],
        new_values: Float[Tensor, "batch new kv_head d_head_v"],
    ) -> tuple[Float[Tensor, "batch key kv_head d_head"], Float[Tensor, "batch key kv_head d_head_v"]]:
        """Past + new keys and values; stored, too, unless the entry is frozen.

        A frozen entry of one row serves new tokens of any batch. An empty entry takes any floating dtype on any
        device. What is stored keeps no autograd graph; what is given back does.

        Raises:
            CacheError: the new tensors' rows, heads, dtype or device do not fit.
        """
        self._check_new(new_keys, self._held.keys, "keys")
        self._check_new(new_values, self._held.values, "values")
        if new_keys.shape[:3] != new_values.shape[:3]:
            raise CacheError(
                f"new keys are {list(new_keys.shape)}, new values {list(new_values.shape)}; expected the same rows, "
                "columns and heads"
            )
        held = self._readable()
        graph = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (new_keys, new_values, held.keys, held.values)
        )
        joined = None
        if self.frozen or graph:
            joined = self._join(self.past_keys, new_keys), self._join(self.past_values, new_values)
        if not self.frozen:
            self._held = self._store(held, new_keys.detach(), new_values.detach())
        return (self.past_keys, self.past_values) if joined is None else joined

    def _store(self, held: _Held, new_keys: Tensor, new_values: Tensor) -> _Held:
        """What is held with new columns behind it, in the same buffers where they have room."""
        keys, values, past = held
        length = past + new_keys.shape[1]
        if length == past:
            return held
        if length > keys.shape[1]:
            # A first fill takes what it needs; each later one at least doubles.
            capacity = length if past == 0 else max(length, 2 * past)
            keys = self._grow(keys[:, :past].to(new_keys), capacity)
            values = self._grow(values[:, :past].to(new_values), capacity)
        # `.data`: these columns were shown to nobody, so nothing that autograd saved changes; its counter of in-place
        # changes covers the whole buffer and would say so.
        keys.data[:, past:length] = new_keys
        values.data[:, past:length] = new_values
        return _Held(keys, values, length)

    @staticmethod
    def _grow(past: Tensor, capacity: int) -> Tensor:
        batch, length, n_kv_heads, d_head = past.shape
        with lasting_tensors(), torch.no_grad():
            grown = past.new_empty(batch, capacity, n_kv_heads, d_head)
            grown[:, :length] = past
        return grown

    def _readable(self) -> _Held:
        """The buffers; ones made under inference_mode are copied once when they are used outside of it."""
        held = self._held
        if (held.keys.is_inference() or held.values.is_inference()) and not torch.is_inference_mode_enabled():
            held = _Held(held.keys.clone(), held.values.clone(), held.length)
            self._held = held
        return held

    @staticmethod
    def _join(past: Tensor, new: Tensor) -> Tensor:
        if past.shape[1] == 0:
            return new
        return torch.cat([past.expand(new.shape[0], -1, -1, -1), new], dim=1)

    def _check_new(self, new: Tensor, past: Tensor, noun: str) -> None:
        _check_heads(new, "new " + noun)
        takes_any_rows = self.frozen and past.shape[0] == 1
        fits = new.shape[2:] == past.shape[2:] and (takes_any_rows or new.shape[0] == past.shape[0])
        other_dtype = new.dtype != past.dtype and len(self) > 0
        if fits and not other_dtype and (new.device == past.device or not len(self)):
            return
        rows = "any number of" if takes_any_rows else str(past.shape[0])
        way_out = ""
        if other_dtype:
            way_out = (
                ". Under torch.autocast keys and values come in another dtype than the model's: run prefill and "
                "continuation both inside or both outside of torch.autocast, or convert the cache with "
                "cache.to(dtype=...)"
            )
        raise CacheError(
            f"new {noun} are {_describe(new)}; this cache takes {rows} rows of {past.shape[2]} key-value heads of "
            f"width {past.shape[3]}, {past.dtype} on {past.device}{way_out}"
        )

    def roll_back(self, length: int) -> None:
        """Forget what was stored past `length` columns.

        Raises:
            CacheError: the entry is frozen, or holds fewer columns.
        """
        if self.frozen:
            raise CacheError("a frozen entry cannot be rolled back; unfreeze the cache, or take cache.crop(n)")
        length = read_count(length, what="length", least=0, most=len(self))
        if length < len(self):
            # No spare room: the columns that are forgotten may be seen through views, so the next append copies.
            keys, values, _ = self._held
            self._held = _Held(keys[:, :length], values[:, :length], length)
            self._n_unchanged = min(self._n_unchanged, length)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}"


def _check_heads(tensor: object, what: str) -> None:
    if not isinstance(tensor, Tensor):
        raise CacheError(f"{what}: found a {type(tensor).__name__}; expected a tensor [batch pos n_kv_heads d_head]")
    if tensor.ndim != 4 or not tensor.is_floating_point():
        raise CacheError(f"{what}: found {_describe(tensor)}; expected a floating tensor [batch pos n_kv_heads d_head]")
