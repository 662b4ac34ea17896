"""Direct logit attribution by source token: from which tokens a head takes what it adds to a logit.

**Method** (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"). What a head writes is linear in
its values, with the attention pattern as the weights, so its direct share of a logit is a sum over source tokens `s`:

    share of head h at position p  =  sum over s of  pattern_h[p, s] * <norm(v_h[s] W_O), W_U[:, answer]>

with the denominators of the final norm, and of a norm at the exit of attention, held at the values they had in the run
at `p`. With `incorrect_tokens` the direction is a difference of two columns of `W_U`.

**How to read it.** In units of logits, as in `analysis.attribution`: the values of one head and row sum to what
`attribute_to_heads` gives for it. A source is the position that values are read at; what stands there is what lower
layers made of it, not the embedding of its token alone. The value bias `b_V` counts with the source that it is read at.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.components import of_heads
from hooklens.activation_cache.readout import FrozenNorm, Readout, freeze_norm
from hooklens.activation_cache.stream import require_weight
from hooklens.analysis.attribution import ASKING, Attribution, prepare_attribution
from hooklens.analysis.reading.runs import Run, take_run
from hooklens.analysis.reading.token_names import Tokens, name_tokens
from hooklens.arguments import reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.precision import widen

if TYPE_CHECKING:
    import pandas


@reads(**ASKING)
@torch.no_grad()
def attribute_to_sources(
    model: HookedCausalLM,
    cache: Run,
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    pos: int = -1,
) -> "pandas.DataFrame":
    """What each head takes from each source token and adds to a logit, or to a difference of two.

    Columns: `component` (`"L0H3"`), `layer`, `head`, `row`, `source` (the position, counted over the row's tokens),
    `token` (the source's text, or its id without a tokenizer; None where the run did not start at tokens), `value`.
    The values of a component and row sum to its value in `attribute_to_heads`. In a causal
    network sources after `pos` have no lines.

    Args:
        model: the model of the run.
        cache: a run: text or token ids, or a cache of all positions with `pattern`, `v` and the final `scale`.
        tokens: a token, or one per row: ids or text, in a list, array or tensor.
        incorrect_tokens: what to compare with, one for each of `tokens`.
        pos: the position whose logits are meant, counted over each row's tokens; -1 is a row's last one.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError, TransformError: the cache is not this model's, or the tokens do not fit its rows.
        InputError: a row has no such position, text is not one token, or the values of some keys were not captured.
    """
    cache = take_run(model, cache, ("hook_pattern", "hook_v", "hook_resid_post", "hook_scale"))
    layers = [block.layer for block in model.cfg.blocks if block.attn is not None]
    names = [f"blocks.{layer}.attn.hook_{name}" for layer in layers for name in ("pattern", "v")]
    scales = [name for name in of_heads(cache, layers).names if name.endswith("hook_scale")]
    asked = prepare_attribution(model, cache, tokens, incorrect_tokens, pos, [*names, *scales])
    lines: list[dict[str, Any]] = []
    labels = _name_sources(model, cache, asked.columns)
    cache = cache.gathered(asked.asked.directions.device)
    for layer in layers:
        shares = _share_by_source(asked, cache, layer)
        for head, row, source, column in _places(asked, shares.shape[1]):
            lines.append(
                {
                    "component": f"L{layer}H{head}",
                    "layer": layer,
                    "head": head,
                    "row": row,
                    "source": source,
                    "token": labels[row][source],
                    "value": float(shares[row, head, column]),
                }
            )
    columns = ["component", "layer", "head", "row", "source", "token", "value"]
    table: pandas.DataFrame = import_package("pandas").DataFrame(lines, columns=columns)
    return table


def _places(asked: Attribution, n_heads: int) -> Iterator[tuple[int, int, int, int]]:
    """Head, row, source and the source's column, of all sources that the position can see."""
    for head in range(n_heads):
        for row, (own, at) in enumerate(zip(asked.columns, asked.chosen, strict=True)):
            for source, column in enumerate(own):
                if column <= at or not asked.cache.cfg.causal:
                    yield head, row, source, column


def _name_sources(model: HookedCausalLM, cache: ActivationCache, columns: list[list[int]]) -> list[tuple[Any, ...]]:
    if cache.tokens is None:
        return [(None,) * len(own) for own in columns]
    return [name_tokens(model, cache.tokens[row][own]) for row, own in enumerate(columns)]


def _share_by_source(asked: Attribution, cache: ActivationCache, layer: int) -> Float[Tensor, "batch head key"]:
    """What each head adds from each captured column."""
    attn = f"blocks.{layer}.attn"
    per_head = f"{attn}.hook_v_per_head"
    pattern, v = cache[f"{attn}.hook_pattern"], cache[per_head if per_head in cache else f"{attn}.hook_v"]
    if not cache.has_batch_dim:
        pattern, v = pattern[None], v[None]
    if pattern.shape[-1] != v.shape[1]:
        raise InputError(
            f"attribute_to_sources: layer {layer} attended to {pattern.shape[-1]} positions, and the values of "
            f"{v.shape[1]} were captured; capture all positions (no pos_slice) of a run without past_kv_cache"
        )
    W_O = require_weight(asked.cache, f"{attn}.W_O")
    v = v.repeat_interleave(len(W_O) // v.shape[2], dim=2)
    at = torch.tensor(asked.chosen, device=pattern.device)
    weights = widen(pattern[torch.arange(len(pattern), device=pattern.device), :, at])
    return weights * _read_values(asked, v, W_O, layer)


def _read_values(
    asked: Attribution, v: Float[Tensor, "batch key head d_head"], W_O: Tensor, layer: int
) -> Float[Tensor, "batch head key"]:
    """The product of each value, through `W_O`, with what is asked; no vector of the stream is built for it."""
    readout = asked.readout
    exit_norm = None
    if asked.cache.cfg.block(layer).norm_after:
        exit_norm = freeze_norm(asked.cache, f"blocks.{layer}.ln1_post", pos_slice=0, purpose="attribution by source")
    # One position asks for all keys, so its directions and denominators get an axis of keys.
    keyed = Readout(norm=_per_key(readout.norm), directions=_directions(readout))
    shares = keyed.read_products(v, W_O, _per_key(exit_norm))[..., 0].permute(1, 0, 2)
    scale = asked.cache.cfg.residual_scale
    return shares if scale == 1 else shares * scale


def _per_key(norm: FrozenNorm | None) -> FrozenNorm | None:
    return None if norm is None else replace(norm, scale=norm.scale.unsqueeze(-2))


def _directions(readout: Readout) -> Float[Tensor, "*rows_and_key n d_model"]:
    directions = readout.directions
    assert directions is not None
    return directions[:, None] if directions.ndim > 2 else directions
