"""The key-value cache: past keys and values of every layer, to append to or to share.

Memory per token and row is `2 * n_layers * n_kv_heads * d_head * itemsize` bytes; grouped-query heads are
stored once. Of latent attention it is the keys and values of all heads, not the latents (`cfg.cache_width` numbers).
Keys are stored after rotary, as hooks left them.

A frozen cache is a value: running a model on it leaves it as it is, so it can serve any number of calls,
and one with a single row serves a batch of any size.
"""

from hooklens.kv_cache.cache import HookedKeyValueCache
from hooklens.kv_cache.entry import HookedKeyValueCacheEntry

__all__ = ["HookedKeyValueCache", "HookedKeyValueCacheEntry"]
