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
from functools import partial
from typing import TYPE_CHECKING

import torch

from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.components import (
    Components,
    LabelledStack,
    check_any,
    join_stacks,
    of_embeddings,
    of_heads,
    of_neurons,
    of_outputs,
    read_components,
    read_remainder,
)
from hooklens.activation_cache.logits import LogitDirections, align_directions, find_directions
from hooklens.activation_cache.readout import Readout, make_readout
from hooklens.activation_cache.stream import locate, require, take_positions
from hooklens.analysis.reading.connection import connect_cache, read_model
from hooklens.analysis.reading.runs import Run, read_run_or_prompt, take_run
from hooklens.analysis.reading.token_columns import choose_tokens, list_tokens, take_columns
from hooklens.analysis.reading.token_names import Tokens, read_outputs
from hooklens.arguments import Reader, optional, read_int, reads
from hooklens.axes import EMBEDDINGS
from hooklens.causal_lm import HookedCausalLM
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas


ASKING: dict[str, Reader] = {"model": read_model, "cache": read_run_or_prompt, "pos": read_int}
"""Readers of what all attributions take."""

_AT_THE_END = ("hook_resid_post", "hook_scale")
"""What every attribution reads: denominators of norms, and the last stream."""

_K = optional(partial(read_int, least=1))


@reads(**ASKING)
@torch.no_grad()
def attribute_to_components(
    model: HookedCausalLM,
    cache: Run,
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
        cache: a run: text or token ids, or a cache with `embed` (`pos_embed`), `attn_out`, `mlp_out` and the final
            `scale`.
        tokens: a token, or one per row: ids or text, in a list, array or tensor.
        incorrect_tokens: what to compare with, one for each of `tokens`.
        pos: the position whose logits are meant, counted over each row's captured tokens; -1 is a row's last one,
            whatever padding follows.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError, TransformError: the cache is not this model's, or the tokens do not fit its rows.
        InputError: a row has no such position, or text is not one token.
    """
    cache = take_run(model, cache, (*EMBEDDINGS, "hook_attn_out", "hook_mlp_out", *_AT_THE_END))
    components = [of_embeddings(cache), of_outputs(locate(cache.cfg, None))]
    reading = prepare_attribution(model, cache, tokens, incorrect_tokens, pos, _names(components))
    return reading.tabulate(read_components(reading.cache, components, reading.readout))


@reads(**ASKING)
@torch.no_grad()
def attribute_to_heads(
    model: HookedCausalLM,
    cache: Run,
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
        InputError: a row has no such position, or text is not one token.
    """
    cache = take_run(model, cache, ("hook_z", *_AT_THE_END))
    point = locate(cache.cfg, None)
    heads = [of_heads(cache, point.attention_layers)]
    names = [*_names(heads), point.name_in(cache)]
    reading = prepare_attribution(model, cache, tokens, incorrect_tokens, pos, names)
    return reading.tabulate(read_components(reading.cache, heads, reading.readout, remainder_at=point))


@reads(**ASKING, k=_K)
@torch.no_grad()
def attribute_to_neurons(
    model: HookedCausalLM,
    cache: Run,
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
        cache: a run: text or token ids, or the cache of one.
        tokens: a token, or one per row: ids or text, in a list, array or tensor.
        incorrect_tokens: what to compare with, one for each of `tokens`.
        pos: the position whose logits are meant, as there.
        k: list the `k` neurons with the largest values, up or down, averaged over rows; the others count to
            the remainder. None: all.

    Raises:
        MissingActivationError: lists what was not captured.
        CacheError, TransformError: the cache is not this model's, or the tokens do not fit its rows.
        InputError: a row has no such position, text is not one token, or `k` is below 1.
    """
    cache = take_run(model, cache, ("hook_post", *_AT_THE_END))
    point = locate(cache.cfg, None)
    neurons = [of_neurons(cache, point.mlp_layers)]
    names = [*_names(neurons), point.name_in(cache)]
    reading = prepare_attribution(model, cache, tokens, incorrect_tokens, pos, names)
    check_any(neurons, point)
    stack = read_components(reading.cache, neurons, reading.readout)
    if k is not None:
        size = stack.values.abs().flatten(1).mean(1)
        largest = size.topk(min(k, len(size))).indices
        stack = LabelledStack(stack.values[largest], [stack.labels[index] for index in largest.tolist()])
    remainder = read_remainder(reading.cache, point, reading.readout, [stack])
    return reading.tabulate(join_stacks([stack, remainder]))


def _names(components: list[Components]) -> list[str]:
    return [name for one in components for name in one.names]


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """One question about the logits: what is asked, and how components answer it.

    Attributes:
        cache: the run, cut to the one column of each row that is asked about.
        readout: reads a component's share.
        asked: the tokens.
        columns: of the run, those of each row that are tokens.
        chosen: of these, the one that is asked about.
    """

    cache: ActivationCache
    readout: Readout
    asked: LogitDirections
    columns: list[list[int]]
    chosen: list[int]

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


def prepare_attribution(
    model: HookedCausalLM,
    cache: ActivationCache,
    tokens: Tokens,
    incorrect_tokens: Tokens | None,
    pos: int,
    names: list[str],
) -> Attribution:
    """Check what is asked against what the cache holds, and cut the cache to it.

    Args:
        model, cache, tokens, incorrect_tokens, pos: those of `attribute_to_components`.
        names: the activations that will be read.
    """
    cache = connect_cache(cache, model)
    point = locate(cache.cfg, None)
    # What tells rows and positions, whatever else is read: the final norm's denominator, or the stream itself.
    whole = point.name_in(cache) if point.norm is None else f"{point.norm}.hook_scale"
    require(cache, dict.fromkeys([*names, whole]), purpose="attribution")
    asked_of = cache[whole]
    n_rows, n_captured = len(asked_of) if cache.has_batch_dim else 1, asked_of.shape[-2]
    columns = list_tokens(cache, n_captured, n_rows)
    places = choose_tokens(columns, pos, what="pos")
    chosen = [own[place] for own, [place] in zip(columns, places, strict=True)]
    taken = take_columns(cache, torch.tensor(chosen)[:, None], n_captured).gathered(asked_of.device)
    plain = make_readout(taken, point, purpose="attribution", names=[], apply_ln=True, pos_slice=0)
    stream = take_positions(taken[whole], -2, 0)
    asked = find_directions(
        taken,
        read_outputs(model, tokens, what="tokens"),
        None if incorrect_tokens is None else read_outputs(model, incorrect_tokens, what="incorrect_tokens"),
        like_activation=stream,
    )
    directions = align_directions(asked.directions, stream.shape[:-1])[..., None, :]
    readout = Readout(pos_slice=0, norm=plain.norm, directions=directions)
    return Attribution(cache=taken, readout=readout, asked=asked, columns=columns, chosen=chosen)
