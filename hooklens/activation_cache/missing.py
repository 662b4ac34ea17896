"""Why an activation is not in a cache: the model has none, or nobody captured it."""

from collections.abc import Collection

from hooklens.axes import layer_of
from hooklens.config import HookedConfig, LearnedPositions, RotaryPositions
from hooklens.errors import CacheError, join_names, suggest_names

GRAD = "_grad"
"""What stands after an activation's name in the name of its gradient."""


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
    if name.endswith("hook_result") and all(f"blocks.{layer}.attn.hook_z" in held for layer in range(cfg.n_layers)):
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
    module, _, name = point.rpartition(".")
    module = module.rpartition(".")[2]
    shares_keys = cfg.n_kv_heads != cfg.n_heads
    conditions = {
        "hook_pos_embed": (isinstance(cfg.positions, LearnedPositions), "its positions are not learned vectors"),
        "hook_resid_mid": (cfg.wiring == "sequential", "its blocks are parallel"),
        "hook_rot_q": (isinstance(cfg.positions, RotaryPositions), "its positions are not rotary"),
        "hook_rot_k": (isinstance(cfg.positions, RotaryPositions), "its positions are not rotary"),
        "hook_k_per_head": (shares_keys, "its query heads share no keys, so hook_k has them per query head"),
        "hook_v_per_head": (shares_keys, "its query heads share no values, so hook_v has them per query head"),
        "hook_pre_linear": (cfg.gated_mlp, "its MLPs are not gated"),
        "ln1": (cfg.norm_before, "it has no norms before its branches"),
        "ln2": (cfg.norm_before and not cfg.shared_norm, "its MLPs have no norm of their own"),
        "ln1_post": (cfg.norm_after, "it has no norms after its branches"),
        "ln2_post": (cfg.norm_after, "it has no norms after its branches"),
        "q_norm": (cfg.qk_norm is not None, "it has no query-key norm"),
        "k_norm": (cfg.qk_norm is not None, "it has no query-key norm"),
    }
    for part in (module, name):
        exists, reason = conditions.get(part, (True, ""))
        if not exists:
            return reason
    return None
