"""Direct logit attribution: which components of the last stream a logit comes from.

**Method** (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Wang et al. 2022,
"Interpretability in the wild", for logit differences). The last stream is a sum of components `c`, the final
norm with its denominator held at the value it had in the run is linear, so a logit difference is a sum:

    logit[answer] - logit[wrong]  =  sum over c of <norm(c), W_U[:, answer] - W_U[:, wrong]>  +  bias

with `bias` what the final norm's bias and `b_U` add. Components are layer outputs, single heads, or single
neurons.

**How to read it.** In units of logits (before a soft cap, where the model has one). A positive number speaks
for the answer. The numbers of a table and its `remainder` and `bias` sum to the model's own difference.
Only the *direct* path to the unembedding is counted: a head that matters because later layers read what it
wrote scores zero here. Freezing the denominator leaves out that removing a component would change it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.components import LabelledStack, read_points
from hooklens.activation_cache.decomposition import (
    add_remainder,
    decompose_by_head,
    decompose_by_neuron,
    make_readout,
    names_by_head,
    names_by_layer,
    names_by_neuron,
)
from hooklens.activation_cache.logits import LogitDirections, TokenIds, align_directions, find_directions
from hooklens.activation_cache.readout import Readout
from hooklens.activation_cache.stream import StreamPoint, locate
from hooklens.analysis.connection import connect_cache, find_real_positions
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas

Tokens = TokenIds | str | list[str] | list[int] | list[str | int]


@torch.no_grad()
def attribute_to_components(
    model: HookedCausalLM,
    cache: ActivationCache,
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    pos: int = -1,
) -> "pandas.DataFrame":
    """What embeddings, attention and MLP of each layer add to a logit, or to a difference of two.

    Columns: `component` (`"embed"`, `"3_attn_out"`, ..., `"bias"`), `row`, `value`. The values of a row sum to
    its logit (difference).

    Args:
        model: the model of the run.
        cache: a cache with `embed` (`pos_embed`), `attn_out`, `mlp_out` and the final `scale`.
        tokens: a token, or one per row: ids or text.
        incorrect_tokens: what to compare with, one for each of `tokens`.
        pos: the position whose logits are meant, counted over the captured ones.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError, TransformError: the cache is not this model's, or the tokens do not fit its rows.
        InputError: the position is padding, or text is not one token.
    """
    names = names_by_layer(cache, locate(cache.cfg, None))
    reading = _prepare(model, cache, tokens, incorrect_tokens, pos, names)
    return reading.tabulate(read_points(reading.cache, names, reading.readout))


@torch.no_grad()
def attribute_to_heads(
    model: HookedCausalLM,
    cache: ActivationCache,
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    pos: int = -1,
) -> "pandas.DataFrame":
    """What each head adds to a logit, or to a difference of two, and `"remainder"`, what else is in the stream.

    Columns and arguments are those of `attribute_to_components`; the cache needs `z`, the last `resid_post`
    and the final `scale`.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError, TransformError: the cache is not this model's, or the tokens do not fit its rows.
        InputError: the position is padding, or text is not one token.
    """
    names = names_by_head(cache, locate(cache.cfg, None), incl_remainder=True)
    reading = _prepare(model, cache, tokens, incorrect_tokens, pos, names)
    return reading.tabulate(decompose_by_head(reading.cache, reading.point, reading.readout, incl_remainder=True))


@torch.no_grad()
def attribute_to_neurons(
    model: HookedCausalLM,
    cache: ActivationCache,
    tokens: Tokens,
    incorrect_tokens: Tokens | None = None,
    *,
    pos: int = -1,
    k: int | None = None,
) -> "pandas.DataFrame":
    """What each neuron adds to a logit, or to a difference of two, and `"remainder"`, what else is in the stream.

    Columns and arguments are those of `attribute_to_components`; the cache needs `post`, the last `resid_post`
    and the final `scale`. No neuron's vector is built.

    Args:
        model: the model of the run.
        cache: its activations.
        tokens: a token, or one per row: ids or text.
        incorrect_tokens: what to compare with, one for each of `tokens`.
        pos: the position whose logits are meant.
        k: list the `k` neurons with the largest values, up or down, averaged over rows; the others count to
            the remainder. None: all.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError, TransformError: the cache is not this model's, or the tokens do not fit its rows.
        InputError: the position is padding, text is not one token, or `k` is below 1.
    """
    if k is not None and k < 1:
        raise InputError(f"attribute_to_neurons: k={k}; expected at least 1")
    names = names_by_neuron(cache, locate(cache.cfg, None), incl_remainder=True)
    reading = _prepare(model, cache, tokens, incorrect_tokens, pos, names)
    stack = decompose_by_neuron(reading.cache, reading.point, reading.readout, neuron_slice=None, incl_remainder=False)
    if k is not None:
        size = stack.values.abs().flatten(1).mean(1)
        largest = size.topk(min(k, len(size))).indices
        stack = LabelledStack(stack.values[largest], [stack.labels[index] for index in largest.tolist()])
    return reading.tabulate(add_remainder(stack, reading.cache, reading.point, reading.readout))


@dataclass(frozen=True, kw_only=True)
class _Attribution:
    """One question about the logits: what is asked, and how components answer it."""

    cache: ActivationCache
    point: StreamPoint
    readout: Readout
    asked: LogitDirections

    def tabulate(self, stack: LabelledStack) -> "pandas.DataFrame":
        """One line for each component and row, the bias last."""
        values = stack.values[..., 0]
        values = values[:, None] if values.ndim == 1 else values
        bias = self.asked.bias.expand(values.shape[1:])
        lines = [
            {"component": label, "row": row, "value": float(value)}
            for label, per_row in zip([*stack.labels, "bias"], [*values, bias], strict=True)
            for row, value in enumerate(per_row)
        ]
        table: pandas.DataFrame = import_package("pandas").DataFrame(lines)
        return table


def _prepare(
    model: HookedCausalLM,
    cache: ActivationCache,
    tokens: Tokens,
    incorrect_tokens: Tokens | None,
    pos: int,
    names: list[str],
) -> _Attribution:
    """Check what is asked against what the cache holds; `names` are the activations that will be read."""
    cache = connect_cache(cache, model)
    point = locate(cache.cfg, None)
    plain = make_readout(cache, point, purpose="attribution", names=names, apply_ln=True, pos_slice=pos)
    assert plain.norm is not None
    _refuse_padding(cache, pos)
    lead = plain.norm.scale.shape[:-1]
    asked = find_directions(
        cache,
        _to_ids(model, tokens),
        None if incorrect_tokens is None else _to_ids(model, incorrect_tokens),
        like_activation=plain.norm.scale,
    )
    directions = align_directions(asked.directions, lead)[..., None, :]
    readout = Readout(pos_slice=pos, norm=plain.norm, directions=directions)
    return _Attribution(cache=cache, point=point, readout=readout, asked=asked)


def _to_ids(model: HookedCausalLM, tokens: Tokens) -> TokenIds:
    if isinstance(tokens, str):
        return model.to_single_token(tokens)
    if isinstance(tokens, list):
        return torch.tensor([model.to_single_token(token) if isinstance(token, str) else token for token in tokens])
    return tokens


def _refuse_padding(cache: ActivationCache, pos: int) -> None:
    real = find_real_positions(cache, cache["ln_final.hook_scale"].shape[-2])
    padded = [] if real is None else (~real[:, pos]).nonzero()[:, 0].tolist()
    if padded:
        raise InputError(
            f"position {pos} is padding in rows {padded}; give a position that is a token in every row, pad on the "
            "left, or take rows one by one: cache.unpad(row)"
        )
