"""Putting a cache and a model together, if they belong together."""

import dataclasses

from jaxtyping import Bool
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.arguments import reads, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import CacheError, HookLensError, InputError, TransformError
from hooklens.weights.processing import check_transforms_match


def read_model(given: object, *, what: str, error: type[HookLensError] = InputError) -> HookedCausalLM:
    """A model.

    Raises:
        HookLensError: anything else.
    """
    model: HookedCausalLM = require(
        given, kind=HookedCausalLM, what=what, expected="a HookedCausalLM: HookedCausalLM.from_pretrained(...)",
        error=error,
    )  # fmt: skip
    return model


def read_run(given: object, *, what: str, error: type[HookLensError] = InputError) -> ActivationCache:
    """What a run captured.

    Raises:
        HookLensError: anything else, a text to run included.
    """
    cache: ActivationCache = require(
        given, kind=ActivationCache, what=what, expected="an ActivationCache: _, cache = model.run_with_cache(...)",
        error=error,
    )  # fmt: skip
    return cache


@reads(cache=read_run, model=read_model)
def connect_cache(cache: ActivationCache, model: HookedCausalLM) -> ActivationCache:
    """The cache with the model's weights to read it by; for one that was read from a file, say.

    Activations of a model read by the weights of another give numbers that look like any others, so both
    records have to match: the configuration and the steps of weight processing.

    Raises:
        TransformError: the weights were processed differently; names both records.
        CacheError: the configurations differ; names the fields and both values.
    """
    try:
        check_transforms_match(cache.transforms, model.transforms)
    except TransformError as error:
        raise TransformError(f"the cache (first) and the model (second) do not belong together: {error}") from error
    fields = [field.name for field in dataclasses.fields(cache.cfg) if field.compare]
    pairs = [(name, getattr(cache.cfg, name), getattr(model.cfg, name)) for name in fields]
    differing = [
        f"{name} is {ours!r} in the cache and {theirs!r} in the model" for name, ours, theirs in pairs if ours != theirs
    ]
    if differing:
        raise CacheError(
            f"the cache is of another model: {'; '.join(differing)}; run this model with run_with_cache, or take the "
            "cache's own"
        )
    return cache.with_weights(model.named_weights())


def find_real_positions(cache: ActivationCache, n_captured: int) -> Bool[Tensor, "batch pos"] | None:
    """Which captured columns are tokens; None where nothing is padding.

    Raises:
        InputError: which of them are padding cannot be told.
    """
    if cache.attention_mask is None:
        return None
    n_new = n_captured if cache.tokens is None else cache.tokens.shape[1]
    real = cache.attention_mask[:, -n_new:].bool()
    if cache.positions is not None and cache.tokens is not None:
        real = real[:, list(cache.positions)]
    elif cache.positions is not None or n_captured != n_new:
        raise InputError(
            f"the cache holds {n_captured} positions of a run with padding, and which of them are padding is not "
            "known; capture without pos_slice, or begin the run at tokens"
        )
    return real
