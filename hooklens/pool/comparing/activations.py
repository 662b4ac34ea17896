"""What is kept of a model's run: the activations at some hook points, one vector for each token compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.axes import find_site
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError, join_names
from hooklens.hooks.names import select_names
from hooklens.model.stream_reader import StreamReader
from hooklens.pool.comparing.prompts import ComparedPrompts

Vectors = Float[Tensor, "token width"]

_STREAMS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post")


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What a model did on the prompts, without the model.

    Attributes:
        vectors: by hook name, on the CPU; axes behind that of positions are laid out one after another.
        reader: reads streams as the model's predictions.
    """

    vectors: dict[str, Vectors]
    reader: StreamReader


def find_sites(model: HookedCausalLM, site: str) -> list[str]:
    """The hook points of a kind, with a vector for each token.

    Raises:
        HookNameError: the model has none.
        InputError: some have no vector for each token, as attention patterns.
    """
    names = select_names(site, model.hook_points(), n_layers=model.cfg.n_layers)
    kinds = {name: find_site(name) for name in names}
    refused = [
        f"{name!r} {list(kind.axes)}" if kind is not None else repr(name)
        for name, kind in kinds.items()
        if kind is None or kind.discrete or kind.axes[:2] != ("batch", "pos")
    ]
    if refused:
        raise InputError(
            f"site {site!r} selects {', '.join(refused[:5])}, which have no vector for each token to compare; take "
            "'resid_post', 'attn_out', 'mlp_out', 'z' or another point with axes ['batch', 'pos', ...]"
        )
    return names


def check_sites(first: str, points: Sequence[str], second: str, others: Sequence[str]) -> None:
    """Refuse models of which one has hook points that the other lacks: its layers have no partners.

    Args:
        first: a model's name.
        points: the hook points of a kind that it has.
        second: another model's name.
        others: those of the same kind that this one has.

    Raises:
        InputError: names them.
    """
    pairs = ((first, points, second, others), (second, others, first, points))
    lacks = [
        f"model {one!r} has no {join_names(missing, limit=5)}, which {other!r} has"
        for one, own, other, theirs in pairs
        if (missing := [name for name in theirs if name not in own])
    ]
    if lacks:
        raise InputError(
            f"{'; '.join(lacks)}; layers are compared with those of the same number, so give models of as many, or a "
            "site that both have"
        )


def are_streams(names: Sequence[str]) -> bool:
    """Whether hook points carry the residual stream, which the unembedding can read."""
    return all(name.rpartition(".")[2] in _STREAMS for name in names)


def trace_model(
    model: HookedCausalLM,
    prompts: ComparedPrompts,
    names: Sequence[str],
    *,
    batch_size: int,
    dtype: torch.dtype | None,
    advance: Callable[[int], object],
) -> Trace:
    """Run a model on the prompts and keep what passes some hook points.

    Args:
        model: the model.
        prompts: the prompts.
        names: the hook points.
        batch_size: prompts run at once.
        dtype: what to keep activations in; None: their own.
        advance: told how many prompts have run, after each batch.
    """
    vectors: dict[str, Tensor] = {}
    n_done = 0
    for batch in prompts.batches(batch_size):
        _, cache = model.run_with_cache(
            batch.ids.to(model.device), names_filter=list(names), attention_mask=batch.mask, return_type=None
        )
        for name in names:
            held = cache[name]
            chosen = held[batch.rows.to(held.device), batch.columns.to(held.device)].flatten(1)
            if name not in vectors:
                vectors[name] = torch.empty(prompts.n_tokens, chosen.shape[1], dtype=dtype or chosen.dtype)
            vectors[name][n_done : n_done + len(chosen)] = chosen
        n_done += len(batch.rows)
        advance(len(batch.ids))
    return Trace(vectors=vectors, reader=StreamReader(model))
