"""Key-value caches under their names of 2.x: HookLens's own, made from a config of 2.x."""

from typing import Any

import torch

from hooklens.compat.transformer_lens.HookedTransformerConfig import HookedTransformerConfig
from hooklens.config import HookedConfig
from hooklens.kv_cache import HookedKeyValueCache, HookedKeyValueCacheEntry


class HookedTransformerKeyValueCacheEntry(HookedKeyValueCacheEntry):
    """Keys and values of one layer."""

    @classmethod
    def init_cache_entry(  # type: ignore[override]
        cls, cfg: HookedTransformerConfig, device: torch.device | str | None = None, batch_size: int = 1
    ) -> Any:
        """An empty entry."""
        return super().init_cache_entry(_network(cfg), device, batch_size, dtype=cfg.dtype)


class HookedTransformerKeyValueCache(HookedKeyValueCache):
    """The entries of all layers."""

    @classmethod
    def init_cache(  # type: ignore[override]
        cls, cfg: HookedTransformerConfig, device: torch.device | str | None = None, batch_size: int = 1
    ) -> Any:
        """An empty cache."""
        return super().init_cache(_network(cfg), device, batch_size, dtype=cfg.dtype)

    def __getitem__(self, idx: int) -> HookedKeyValueCacheEntry:
        """The entry of a layer."""
        return self.entries[idx]


def _network(cfg: HookedTransformerConfig) -> HookedConfig:
    """The network of the model whose config this is."""
    known: HookedConfig | None = getattr(cfg, "network", None)
    return cfg.to_hooked_config() if known is None else known
