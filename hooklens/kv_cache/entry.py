"""One layer's past keys and values, to append to or to read from."""

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.config import HookedConfig
from hooklens.errors import CacheError


class HookedKeyValueCacheEntry:
    """One layer's past keys and values.

    Buffers grow by doubling, so n appends move O(n) bytes in all.

    Args:
        past_keys: `[batch pos n_kv_heads d_head]`.
        past_values: the same shape, dtype and device.
        frozen: appending stores nothing.

    Raises:
        CacheError: keys and values do not go together.
    """

    def __init__(
        self,
        past_keys: Float[Tensor, "batch pos kv_head d_head"],
        past_values: Float[Tensor, "batch pos kv_head d_head"],
        frozen: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        keys, values = (
            f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}" for tensor in (past_keys, past_values)
        )
        if keys != values:
            raise CacheError(f"past keys are {keys}, past values {values}; expected the same shape, dtype and device")
        self._keys = past_keys
        self._values = past_values
        self._length = past_keys.shape[1]
        self.frozen = frozen

    @classmethod
    def init_cache_entry(
        cls,
        cfg: HookedConfig,
        device: torch.device | str | None = None,
        batch_size: int = 1,
        *,
        dtype: torch.dtype | None = None,
    ) -> "HookedKeyValueCacheEntry":
        """An empty entry for one layer of a model."""
        shape = (batch_size, 0, cfg.n_kv_heads, cfg.d_head)
        return cls(torch.empty(shape, device=device, dtype=dtype), torch.empty(shape, device=device, dtype=dtype))

    @property
    def past_keys(self) -> Float[Tensor, "batch pos kv_head d_head"]:
        """The keys so far, after rotary."""
        return self._keys[:, : self._length]

    @property
    def past_values(self) -> Float[Tensor, "batch pos kv_head d_head"]:
        """The values so far."""
        return self._values[:, : self._length]

    def __len__(self) -> int:
        return self._length

    @property
    def batch_size(self) -> int:
        """Rows."""
        return self._keys.shape[0]

    def append(
        self, new_keys: Float[Tensor, "batch new kv_head d_head"], new_values: Float[Tensor, "batch new kv_head d_head"]
    ) -> tuple[Float[Tensor, "batch key kv_head d_head"], Float[Tensor, "batch key kv_head d_head"]]:
        """Past + new keys and values; stored, too, unless the entry is frozen.

        A frozen entry of one row serves new tokens of any batch. What is stored keeps no autograd graph.

        Raises:
            CacheError: the new tensors' rows, heads, dtype or device do not fit.
        """
        self._check_new(new_keys, "keys")
        self._check_new(new_values, "values")
        if new_keys.shape != new_values.shape:
            raise CacheError(
                f"new keys are {list(new_keys.shape)}, new values {list(new_values.shape)}; expected the same shape"
            )
        if self.frozen:
            return self._join(self.past_keys, new_keys), self._join(self.past_values, new_values)
        past_keys, past_values = self.past_keys, self.past_values
        self._store(new_keys.detach(), new_values.detach())
        if torch.is_grad_enabled() and (new_keys.requires_grad or new_values.requires_grad):
            return self._join(past_keys, new_keys), self._join(past_values, new_values)
        return self.past_keys, self.past_values

    def _store(self, new_keys: Tensor, new_values: Tensor) -> None:
        length = self._length + new_keys.shape[1]
        # A buffer made under inference_mode cannot be written to outside of it.
        is_locked = self._keys.is_inference() and not torch.is_inference_mode_enabled()
        if length > self._keys.shape[1] or is_locked:
            # A first fill takes what it needs; each later one at least doubles.
            capacity = length if self._length == 0 else max(length, 2 * self._length)
            self._keys = self._grow(self.past_keys, capacity)
            self._values = self._grow(self.past_values, capacity)
        self._keys[:, self._length : length] = new_keys
        self._values[:, self._length : length] = new_values
        self._length = length

    @staticmethod
    def _grow(past: Tensor, capacity: int) -> Tensor:
        batch, length, n_kv_heads, d_head = past.shape
        grown = past.new_empty(batch, capacity, n_kv_heads, d_head)
        grown[:, :length] = past
        return grown

    @staticmethod
    def _join(past: Tensor, new: Tensor) -> Tensor:
        return torch.cat([past.expand(new.shape[0], -1, -1, -1), new], dim=1)

    def _check_new(self, new: Tensor, noun: str) -> None:
        past = self._keys
        fits = new.shape[0] == past.shape[0] or (self.frozen and past.shape[0] == 1)
        if not fits or new.shape[2:] != past.shape[2:] or new.dtype != past.dtype or new.device != past.device:
            rows = "any number of" if self.frozen and past.shape[0] == 1 else str(past.shape[0])
            raise CacheError(
                f"new {noun} are {list(new.shape)} {new.dtype} on {new.device}; this cache takes {rows} rows of "
                f"{past.shape[2]} key-value heads of width {past.shape[3]}, {past.dtype} on {past.device}"
            )

    def roll_back(self, length: int) -> None:
        """Forget what was stored past `length` columns."""
        self._length = min(self._length, length)
