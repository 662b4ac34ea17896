"""Why an activation is not in a cache: the model has none, or nobody captured it."""

from collections.abc import Collection

from hooklens.axes import layer_of
from hooklens.config import HookedConfig
from hooklens.errors import CacheError, join_names, suggest_names
from hooklens.hooks.capture import GRAD


class MissingActivationError(CacheError, KeyError):
    """The cache holds no activation of that name; also a `KeyError`, as a mapping's callers expect."""

    # KeyError would show the message's repr.
    __str__ = Exception.__str__


def explain_missing(name: str, held: Collection[str], cfg: HookedConfig) -> str:
    """Say why the activation `name` is not among those `held`, and what to do.

    Args:
        name: a full name, with `_grad` after it for a gradient.
        held: the names that were captured.
        cfg: the model's configuration.
    """
    point = name.removesuffix(GRAD)
    reason = why_absent(point, cfg)
    if reason is not None:
        return f"the model has no activation {point!r}: {reason}.{suggest_names(name, held)}"
    if name.endswith(GRAD) and point in held:
        return f"the gradient of {point!r} was not captured; run with incl_bwd=True to have it"
    results = [site for site in cfg.description.points if site.endswith(".hook_result")]
    if name in results and all(site.replace("hook_result", "hook_z") in held for site in results):
        return (
            f"{name!r} was not captured, but follows from what was: cache.compute_head_results() gives a cache with it"
        )
    found = f"the cache holds {join_names(held, limit=8)}" if held else "the cache is empty"
    return f"activation {name!r} was not captured; {found}. Add {point!r} to names_filter to have it"


def why_absent(point: str, cfg: HookedConfig) -> str | None:
    """Why a model of this config lacks a hook point of the grammar; None if it has it."""
    layer = layer_of(point)
    if layer is not None and layer >= cfg.n_layers:
        return f"it has {cfg.n_layers} layers, 0 to {cfg.n_layers - 1}"
    return cfg.description.why_absent(point)
