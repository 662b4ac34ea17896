"""Key-value caches of a network that several processes share, put together."""

from typing import Any

import torch
from torch import Tensor

from hooklens.errors import CacheError, InputError
from hooklens.kv_cache import HookedKeyValueCache, HookedKeyValueCacheEntry
from hooklens.model.decoder import Decoder
from hooklens.parallel.processes import SharedBlocks
from hooklens.parallel.spread import MeshSpread


@torch.no_grad()
def gather_cache(model: Decoder, cache: HookedKeyValueCache) -> HookedKeyValueCache:
    """A cache with the keys and values of all heads and layers, in every process; all of them call it.

    It can be saved, and read by the same network whole.

    Args:
        model: what filled the cache, from `hooklens.parallel.load`.
        cache: stays as it is.

    Raises:
        InputError: the model is not shared by processes.
        CacheError: the cache does not have its layers.
    """
    shared = model.processes
    if not isinstance(shared, SharedBlocks):
        raise InputError("gather_cache: the model is not one that several processes share (hooklens.parallel.load)")
    if len(cache.entries) != model.cfg.n_layers:
        raise CacheError(f"gather_cache: the cache has {len(cache.entries)} layers, the model {model.cfg.n_layers}")
    whole: Any = cache.clone()
    spread = MeshSpread(shared.mesh["tensor"])
    for layer, entry in enumerate(cache.entries):
        keys, values = (_put_together(shared, spread, layer, entry, x) for x in (entry.past_keys, entry.past_values))
        whole.entries[layer] = HookedKeyValueCacheEntry(keys, values, entry.frozen)
    gathered: HookedKeyValueCache = whole
    return gathered


def _put_together(
    shared: SharedBlocks, spread: MeshSpread, layer: int, entry: HookedKeyValueCacheEntry, held: Tensor
) -> Tensor:
    own = shared.share_of_layer(layer, held)
    return spread.gather(own, 2) if own.shape[2] < entry.head_shape[0] else own
