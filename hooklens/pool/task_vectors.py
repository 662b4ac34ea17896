"""What training changed in a model: the difference of its weights and those of the model it was trained from."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import join_names
from hooklens.pool.errors import PoolError
from hooklens.pool.lazy import LazyWeights

_EMBEDDING, _UNEMBEDDING = "embed.W_E", "unembed.W_U"


def subtract_models(tuned: Any, base: Any, *, name: str) -> dict[str, Tensor]:
    """`theta_i - theta_base` by name, in the dtype of the weights.

    Two names of one weight, in both models, share the memory of its difference.

    Args:
        tuned: a hooked model, a transformers model, or `LazyWeights`.
        base: what it was trained from, of the same kind.
        name: the model's, for messages.

    Raises:
        PoolError: the two have other names or shapes; all are listed.
    """
    ours, theirs = _weights_of(tuned), _weights_of(base)
    problems = list(_differences(ours, theirs))
    if problems:
        raise PoolError(f"models.{name} is no fine-tune of _pretrained_: {'; '.join(problems)}")
    other, others = _twins_of(tuned), _twins_of(base)
    twins = {twin: first for twin, first in other.items() if others.get(twin) == first}
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for key in theirs:
            if key not in twins:
                made[key] = ours[key] - theirs[key]
    # A tied unembedding is the embedding, turned.
    shared = {twin: made[first].T if twin == _UNEMBEDDING else made[first] for twin, first in twins.items()}
    return {key: shared[key] if key in shared else made[key] for key in theirs}


def _weights_of(model: Any) -> Mapping[str, Tensor]:
    if isinstance(model, LazyWeights):
        return model
    weights: Mapping[str, Tensor] = model.named_weights() if isinstance(model, HookedCausalLM) else model.state_dict()
    return weights


def _twins_of(model: Any) -> dict[str, str]:
    """Second names of weights that a model has under two, each with the first."""
    if isinstance(model, LazyWeights):
        return {}
    if isinstance(model, HookedCausalLM):
        return {_UNEMBEDDING: _EMBEDDING} if model.cfg.tied_unembed else {}
    first: dict[int, str] = {}
    named = {name: first.setdefault(id(one), name) for name, one in model.named_parameters(remove_duplicate=False)}
    return {name: one for name, one in named.items() if name != one}


def _differences(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[str]:
    missing = [name for name in theirs if name not in ours]
    unknown = [name for name in ours if name not in theirs]
    if missing:
        yield f"it lacks {join_names(missing)}"
    if unknown:
        yield f"it alone has {join_names(unknown)}"
    for name in theirs:
        if name in ours and ours[name].shape != theirs[name].shape:
            yield f"{name!r} is {list(ours[name].shape)}, and {list(theirs[name].shape)} there"
