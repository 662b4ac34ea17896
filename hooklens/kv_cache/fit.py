"""What goes together: the entries of one cache, and a cache with a model. Nothing is read from the device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from hooklens.arguments import refusal
from hooklens.config import HookedConfig
from hooklens.errors import CacheError
from hooklens.kv_cache.arguments import require
from hooklens.kv_cache.entry import HookedKeyValueCacheEntry


class Origin(NamedTuple):
    """What keys and values are of.

    Attributes:
        fingerprint: of the model's configuration; None: not known.
        transforms: the weight-processing steps that were done.
        adapters: the names of the adapters beside the weights that acted, in their order.
    """

    fingerprint: str | None
    transforms: tuple[str, ...]
    adapters: tuple[str, ...]


def check_entries(entries: Sequence[object]) -> None:
    """Check that there is one entry object per layer.

    Raises:
        CacheError: none, one for several layers, or other objects.
    """
    if not entries:
        raise CacheError("a key-value cache needs at least one entry; use HookedKeyValueCache.init_cache(cfg)")
    for layer, entry in enumerate(entries):
        require(entry, HookedKeyValueCacheEntry, what=f"entries[{layer}]", expected="a HookedKeyValueCacheEntry")
    if len({id(entry) for entry in entries}) < len(entries):
        raise CacheError("one entry object stands for several layers, which would all append to it; make one for each")


def check_same_tokens(entries: Sequence[HookedKeyValueCacheEntry], mask: Bool[Tensor, "batch pos"]) -> None:
    """Check that all layers hold the tokens that the mask covers, and are all frozen or none.

    Raises:
        CacheError: they do not; the layers are named.
    """
    frozen = entries[0].frozen
    odd = [layer for layer, entry in enumerate(entries) if entry.frozen != frozen]
    if odd:
        found, rest = ("not frozen", "frozen") if frozen else ("frozen", "not frozen")
        raise CacheError(
            f"the entries of layers {odd} are {found} and the rest of the cache is {rest}: after a call its layers "
            "would hold different tokens. Freeze or unfreeze the whole cache"
        )
    rows, columns = mask.shape
    odd = [layer for layer, entry in enumerate(entries) if (entry.batch_size, len(entry)) != (rows, columns)]
    if odd:
        held = [(entries[layer].batch_size, len(entries[layer])) for layer in odd]
        raise CacheError(
            f"the attention mask covers {rows} rows of {columns} columns, but layers {odd} hold (rows, columns) "
            f"{held}; every layer must hold the same tokens"
        )


def check_model(entries: Sequence[HookedKeyValueCacheEntry], cfg: HookedConfig, *, n_layers: int) -> None:
    """Check layers and heads, and that the network can have a cache at all.

    Args:
        entries: of all layers, or one where they are all alike.
        cfg: the model's.
        n_layers: of the cache.

    Raises:
        CacheError: the entries are another model's, or the network is not causal.
    """
    require(cfg, HookedConfig, what="cfg", expected="a HookedConfig, model.cfg")
    require_causal(cfg)
    heads = cfg.head_shapes if len(entries) == n_layers else tuple(set(cfg.head_shapes))
    if n_layers != cfg.n_layers or [entry.head_shape for entry in entries] != list(heads):
        found = ", ".join(sorted({_describe_heads(n_layers, entry.head_shape) for entry in entries}))
        wanted = ", ".join(sorted({_describe_heads(cfg.n_layers, shape) for shape in heads}))
        where = f" in layers with {list(cfg.kv_heads)} key-value heads" if len(set(cfg.kv_heads)) > 1 else ""
        raise CacheError(
            f"the cache has (layers, key-value heads, d_head) {found}, the model {wanted}{where}: it was made by "
            "another model; make one with model.prefill(prefix)"
        )


def _describe_heads(n_layers: int, shape: tuple[int, int, int]) -> str:
    n_kv_heads, d_key, d_value = shape
    return str((n_layers, n_kv_heads, d_key)) + (f" with values {d_value} wide" if d_value != d_key else "")


def require_causal(cfg: HookedConfig) -> None:
    """Check that what was computed of some tokens stays as it is when others follow them.

    Raises:
        CacheError: the network is not causal.
    """
    if not cfg.causal:
        raise CacheError(
            "this network is not causal (cfg.causal=False): every token sees the later ones, so a new token changes "
            "the keys and values of all that came before and none can be kept. Run whole sequences without a key-value "
            "cache (past_kv_cache=None)"
        )


def check_origin(cache: Origin, model: Origin, *, holds_tokens: bool) -> None:
    """Check that the cache was filled by a model with this configuration, weight processing and acting adapters.

    Raises:
        CacheError: by another one.
    """
    # Before the fingerprint: processing may change the config, too, and is then what there is to tell.
    if holds_tokens and cache.transforms != model.transforms:
        raise CacheError(
            f"the cache was filled by a model with weight processing {_describe_record(cache.transforms)}, the "
            f"weight processing of this model is {_describe_record(model.transforms)}: their keys and values do not go "
            "together. Make a cache with this model's model.prefill(prefix), or call the model that filled it"
        )
    if holds_tokens and cache.adapters != model.adapters:
        raise CacheError(
            f"the cache was filled with adapters {_describe_record(cache.adapters)} acting, and those that act now are "
            f"{_describe_record(model.adapters)}: their keys and values do not go together. Make a cache with "
            "model.prefill(prefix) while the adapters act that are to go on, or have those act that filled it "
            "(model.set_adapter)"
        )
    if cache.fingerprint is not None and cache.fingerprint != model.fingerprint:
        raise CacheError(
            "the cache was made by a model with another configuration (their fingerprints differ); "
            "make one with model.prefill(prefix)"
        )


def check_batch(rows: int, batch: int, *, frozen: bool) -> None:
    """Check that a cache of some rows can serve a batch.

    Raises:
        CacheError: it cannot.
    """
    if batch != rows and not (frozen and rows == 1):
        way_out = "freeze it: a frozen cache of one row serves any batch" if rows == 1 else "use select"
        raise CacheError(f"the cache has {rows} rows and the input {batch}; {way_out}")


def check_place(
    entries: Sequence[HookedKeyValueCacheEntry],
    *,
    device: torch.device | tuple[torch.device, ...],
    dtype: torch.dtype,
) -> None:
    """Check device and dtype; entries without tokens or heads take any dtype, on several devices any of them, too.

    Under `torch.autocast` values come in autocast's dtype, and keys in that or, after a rotation, in the model's.

    Args:
        entries: of all layers, or with one device some of them.
        device: the model's, or one for each layer.
        dtype: of the model's weights.

    Raises:
        CacheError: keys and values lie elsewhere, or have another dtype than the call computes in.
    """
    by_layer = isinstance(device, tuple) and all(isinstance(one, torch.device) for one in device)
    if not isinstance(device, torch.device) and not (by_layer and len(device) == len(entries)):
        raise refusal(device, "device", f"a torch.device, or one for each of {len(entries)} layers", CacheError)
    require(dtype, torch.dtype, what="dtype", expected="a torch.dtype, model.dtype")
    if isinstance(device, tuple):
        _check_layers(entries, device)
        for place in dict.fromkeys(device):
            there = [entry for entry in entries if len(entry) and entry.head_shape[0] and entry.device == place]
            check_place(there, device=place, dtype=dtype)
        return
    computed = find_computing_dtype(dtype, device)
    for entry in entries:
        keys, values = entry.dtypes
        is_typed = len(entry) == 0 or not entry.head_shape[0] or (values == computed and keys in (computed, dtype))
        if entry.device == device and is_typed:
            continue
        found = str(keys) if keys == values else f"{keys} (keys) and {values} (values)"
        under = "" if computed == dtype else f" and computes in {computed} under torch.autocast"
        hint = ""
        if not is_typed:
            hint = ", or run prefill and continuation both inside or both outside of torch.autocast"
        raise CacheError(
            f"the cache is {found} on {entry.device}, the model {dtype} on {device}{under}; "
            f"convert it with cache.to(device, dtype){hint}"
        )


def _check_layers(entries: Sequence[HookedKeyValueCacheEntry], devices: tuple[torch.device, ...]) -> None:
    """Check that each layer's keys and values lie where its block computes.

    Raises:
        CacheError: some do not; the layers are named.
    """
    odd = [
        f"{layer} (on {entry.device}, its block on {device})"
        for layer, (entry, device) in enumerate(zip(entries, devices, strict=True))
        if len(entry) and entry.head_shape[0] and entry.device != device
    ]
    if odd:
        raise CacheError(
            f"the model lies on several devices, and the keys and values of layers {', '.join(odd)} elsewhere than the "
            "blocks that read them; bring the cache there with cache.to(model.layer_devices)"
        )


def find_computing_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a linear map of weights of this dtype computes, `torch.autocast` included."""
    # Autocast leaves float64 as it is.
    if dtype == torch.float64 or not torch.amp.is_autocast_available(device.type):
        return dtype
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def _describe_record(transforms: tuple[str, ...]) -> str:
    return " + ".join(transforms) or "none"
