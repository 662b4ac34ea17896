r"""The logit lens: what the model would predict if it ended at each layer.

**Method** (nostalgebraist 2020, "interpreting GPT: the logit lens"). The stream `x_l` at the entrance of
layer `l` is read as the model reads its last one, with the final norm computed anew for it:

    q_l = softmax(softcap(norm_final(x_l) W_U + b_U))

and compared with the model's own distribution `p = q_{n_layers}` by the Kullback-Leibler divergence of
Belrose et al. 2023, "Eliciting latent predictions from transformers with the tuned lens":

    KL(p || q_l) = \sum_t p(t) (log p(t) - log q_l(t))    in nats.

**How to read it.** 0 is the final prediction; values fall towards the end, often not evenly: a drop shows
the layer at which the prediction is made up. `ln(d_vocab)` is about what an unformed prediction has. Early
layers need not keep their information in the directions that the unembedding reads, so a large value does
not show that the information is absent. In a parallel block there is no stream between attention and MLP,
so sub-layers exist in sequential blocks only.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.stream import locate, places_up_to
from hooklens.analysis.reading.connection import connect_cache, read_model, read_run
from hooklens.analysis.reading.token_columns import choose_tokens, list_tokens, take_columns
from hooklens.analysis.reading.token_names import name_tokens, read_token
from hooklens.arguments import read_flag, read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.hooks.choice import Choice
from hooklens.model.stream_reader import StreamReader
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas


class LensReading(NamedTuple):
    """What one stream predicts.

    Attributes:
        stream: `"0_pre"`, `"0_mid"`, ..., `"final_post"`.
        logprobs: the distribution at each position, log-probabilities in nats.
    """

    stream: str
    logprobs: Float[Tensor, "batch pos d_vocab"]


@reads(model=read_model, cache=read_run, sublayers=read_flag)
@torch.no_grad()
def read_streams(
    model: HookedCausalLM,
    cache: ActivationCache,
    *,
    sublayers: bool = False,
    pos_slice: Choice = None,
) -> Iterator[LensReading]:
    """The predictions of every stream, one after the other, so that only one holds memory.

    Args:
        model: the model of the run.
        cache: a cache with `resid_pre` of every layer (and `resid_mid`) and the last `resid_post`.
        sublayers: read the streams between attention and MLP, too.
        pos_slice: positions over each row's captured tokens, as many in every row (an int keeps the axis); None is
            all captured columns, padding included.

    Raises:
        MissingActivationError: lists the streams that were not captured.
        CacheError, TransformError: the cache is not this model's.
        InputError: a row lacks a position, or rows have different numbers of those that a slice selects.
    """
    cache = connect_cache(cache, model)
    if pos_slice is not None:
        tokens, n_captured = _list_tokens(cache)
        places = choose_tokens(tokens, pos_slice, what="pos_slice")
        counts = sorted({len(row) for row in places})
        if len(counts) > 1:
            raise InputError(
                f"read_streams: pos_slice={pos_slice!r} selects from {counts[0]} to {counts[-1]} tokens of a row; give "
                "positions that every row has, or None for all columns, padding included"
            )
        cache = _take(cache, _to_columns(tokens, places), n_captured, sublayers=sublayers)
    reader = StreamReader(model)
    for label, stream in _label_streams(cache, sublayers=sublayers):
        yield LensReading(label, reader.read(stream))


def _list_tokens(cache: ActivationCache) -> tuple[list[list[int]], int]:
    """The captured columns of each row that are tokens, and how many columns were captured."""
    end = locate(cache.cfg, None).read(cache)
    n_captured = end.shape[-2]
    return list_tokens(cache, n_captured, len(end) if cache.has_batch_dim else 1), n_captured


def _to_columns(tokens: list[list[int]], places: list[list[int]]) -> Int[Tensor, "batch n"]:
    """The columns of chosen tokens; rows with fewer of them than others are filled up with any token of theirs."""
    width = max(map(len, places))
    columns = [[own[place] for place in row] for own, row in zip(tokens, places, strict=True)]
    return torch.tensor(
        [row + own[:1] * (width - len(row)) for own, row in zip(tokens, columns, strict=True)], dtype=torch.long
    )


def _take(
    cache: ActivationCache, columns: Int[Tensor, "batch n"], n_captured: int, *, sublayers: bool
) -> ActivationCache:
    """The streams at some columns of each row."""
    places = places_up_to(locate(cache.cfg, None), incl_mid=sublayers)
    return take_columns(cache, columns, n_captured, names=[place.name_in(cache) for place in places])


def _label_streams(cache: ActivationCache, *, sublayers: bool) -> list[tuple[str, Float[Tensor, "batch pos d_model"]]]:
    streams, labels = cache.accumulated_resid(incl_mid=sublayers, return_labels=True)
    return list(zip(labels, streams if cache.has_batch_dim else streams[:, None], strict=True))


@reads(
    model=read_model,
    cache=read_run,
    sublayers=read_flag,
    k=partial(read_int, least=1),
)
@torch.no_grad()
def logit_lens(
    model: HookedCausalLM,
    cache: ActivationCache,
    *,
    sublayers: bool = False,
    pos_slice: Choice = -1,
    k: int = 5,
    target: str | int | None = None,
) -> "pandas.DataFrame":
    """What each layer would predict: one line for each stream, row and position.

    Columns: `stream`; `row` and `pos` (counted over the row's captured tokens); `kl`, KL(final || this) in nats;
    `entropy` in nats; `top_tokens` and `top_probs`, the `k` most likely tokens (text, or ids without a
    tokenizer); with a target `target_logprob` and `target_rank` (0 is the most likely). Padding has no lines.

    Args:
        model: the model of the run.
        cache: a cache with `resid_pre` of every layer (and `resid_mid`) and the last `resid_post`.
        sublayers: read the streams between attention and MLP, too.
        pos_slice: positions over each row's captured tokens (an int, a slice, or a list, array or tensor of ints);
            -1 is a row's last token, whatever padding follows. None: all tokens.
        k: how many tokens to list.
        target: a token to follow, its text or id.

    Raises:
        MissingActivationError: lists the streams that were not captured.
        CacheError, TransformError: the cache is not this model's.
        InputError: `k` is not from 1 to d_vocab, the target is no token, a row lacks a position, or which columns are
            padding is not known.
    """
    refuse_other_outputs(model.cfg, "logit_lens lists tokens (read_streams gives the distributions)", InputError)
    d_vocab = model.cfg.d_vocab
    if k > d_vocab:
        raise InputError(f"logit_lens: k={k}; expected 1 to {d_vocab}, the size of the vocabulary")
    target_id = None if target is None else read_token(model, target, what="target")
    cache = connect_cache(cache, model)
    tokens, n_captured = _list_tokens(cache)
    places = choose_tokens(tokens, pos_slice, what="pos_slice")
    taken = _take(cache, _to_columns(tokens, places), n_captured, sublayers=sublayers)
    streams = _label_streams(taken, sublayers=sublayers)
    reader = StreamReader(model)
    final = reader.read(streams[-1][1])
    records = [
        record
        for label, stream in streams
        for record in _describe(
            model, LensReading(label, reader.read(stream)), final, places=places, k=k, target=target_id
        )
    ]
    table: pandas.DataFrame = import_package("pandas").DataFrame(records)
    return table


def _describe(
    model: HookedCausalLM,
    reading: LensReading,
    final: Float[Tensor, "batch pos d_vocab"],
    *,
    places: list[list[int]],
    k: int,
    target: int | None,
) -> Iterator[dict[str, object]]:
    logprobs = reading.logprobs
    divergence = F.kl_div(logprobs, final, reduction="none", log_target=True).sum(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    top = logprobs.topk(k)
    for row, positions in enumerate(places):
        for column, position in enumerate(positions):
            line: dict[str, object] = {
                "stream": reading.stream,
                "row": row,
                "pos": position,
                "kl": float(divergence[row, column]),
                "entropy": float(entropy[row, column]),
                "top_tokens": name_tokens(model, top.indices[row, column]),
                "top_probs": tuple(top.values[row, column].exp().tolist()),
            }
            if target is not None:
                own = logprobs[row, column, target]
                line["target_logprob"] = float(own)
                line["target_rank"] = int((logprobs[row, column] > own).sum())
            yield line
