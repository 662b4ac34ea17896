"""The streams of a run, and the distribution that each is read as."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.stream import locate, places_up_to
from hooklens.analysis.lens.transport import Transport, carry, read_transport
from hooklens.analysis.reading.connection import connect_cache, read_model
from hooklens.analysis.reading.runs import Run, read_run_or_prompt, take_run
from hooklens.analysis.reading.token_columns import choose_tokens, list_tokens, take_columns
from hooklens.arguments import optional, read_flag, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.hooks.choice import Choice
from hooklens.model.stream_reader import StreamReader


class LensReading(NamedTuple):
    """What one stream predicts.

    Attributes:
        stream: `"0_pre"`, `"0_mid"`, ..., `"final_post"`.
        logprobs: the distribution at each position, log-probabilities in nats.
    """

    stream: str
    logprobs: Float[Tensor, "batch pos d_vocab"]


@reads(model=read_model, cache=read_run_or_prompt, sublayers=read_flag, transport=optional(read_transport))
@torch.no_grad()
def read_streams(
    model: HookedCausalLM,
    cache: Run,
    *,
    sublayers: bool = False,
    pos_slice: Choice = None,
    transport: Transport | None = None,
) -> Iterator[LensReading]:
    """The predictions of every stream, one after the other, so that only one holds memory.

    Args:
        model: the model of the run.
        cache: a run: text or token ids, or a cache with `resid_pre` of every layer (and `resid_mid`) and the last
            `resid_post`.
        sublayers: read the streams between attention and MLP, too.
        pos_slice: positions over each row's captured tokens, as many in every row (an int keeps the axis); None is
            all captured columns, padding included.
        transport: what carries a stream to the end before it is read, a `TunedLens` or a `JacobianLens`: the streams
            that it was fitted on and the last one are read. None: every stream is read as it is.

    Raises:
        MissingActivationError: lists the streams that were not captured.
        CacheError, TransformError: the cache, or the transport, is not this model's.
        InputError: a row lacks a position, or rows have different numbers of those that a slice selects; or sublayers
            are asked of a transport, which none is fitted on.
    """
    ends = ("hook_resid_pre", "hook_resid_post", *(["hook_resid_mid"] if sublayers else []))
    cache = connect_cache(take_run(model, cache, ends), model)
    check_transport(model, transport, sublayers=sublayers)
    if pos_slice is not None:
        tokens, n_captured = list_captured(cache)
        places = choose_tokens(tokens, pos_slice, what="pos_slice")
        counts = sorted({len(row) for row in places})
        if len(counts) > 1:
            raise InputError(
                f"read_streams: pos_slice={pos_slice!r} selects from {counts[0]} to {counts[-1]} tokens of a row; give "
                "positions that every row has, or None for all columns, padding included"
            )
        cache = take_streams(cache, to_columns(tokens, places), n_captured, sublayers=sublayers)
    reader = StreamReader(model)
    for label, stream in label_streams(cache, sublayers=sublayers, transport=transport):
        yield LensReading(label, reader.read(stream))


def check_transport(model: HookedCausalLM, transport: Transport | None, *, sublayers: bool) -> None:
    """Refuse a transport that says nothing about this model's streams.

    Raises:
        InputError: it was fitted on another model, or sublayers are asked of it.
        TransformError: it was fitted on weights that were processed otherwise.
    """
    if transport is None:
        return
    transport.check(model)
    if sublayers:
        raise InputError(
            "sublayers=True with a transport: transports are fitted on the streams that enter layers, not on those "
            "between attention and MLP; leave one of the two out"
        )


def list_captured(cache: ActivationCache) -> tuple[list[list[int]], int]:
    """The captured columns of each row that are tokens, and how many columns were captured."""
    end = locate(cache.cfg, None).read(cache)
    n_captured = end.shape[-2]
    return list_tokens(cache, n_captured, len(end) if cache.has_batch_dim else 1), n_captured


def to_columns(tokens: list[list[int]], places: list[list[int]]) -> Int[Tensor, "batch n"]:
    """The columns of chosen tokens; rows with fewer of them than others are filled up with any token of theirs."""
    width = max(map(len, places))
    columns = [[own[place] for place in row] for own, row in zip(tokens, places, strict=True)]
    return torch.tensor(
        [row + own[:1] * (width - len(row)) for own, row in zip(tokens, columns, strict=True)], dtype=torch.long
    )


def take_streams(
    cache: ActivationCache, columns: Int[Tensor, "batch n"], n_captured: int, *, sublayers: bool
) -> ActivationCache:
    """The streams at some columns of each row."""
    places = places_up_to(locate(cache.cfg, None), incl_mid=sublayers)
    return take_columns(cache, columns, n_captured, names=[place.name_in(cache) for place in places])


def label_streams(
    cache: ActivationCache, *, sublayers: bool, transport: Transport | None
) -> Iterator[tuple[str, Float[Tensor, "batch pos d_model"]]]:
    """Each stream under its name, carried to the end where there is a transport, one at a time."""
    streams, labels = cache.accumulated_resid(incl_mid=sublayers, return_labels=True)
    for label, stream in zip(labels, streams if cache.has_batch_dim else streams[:, None], strict=True):
        if transport is None or label == "final_post":
            yield label, stream
        elif (layer := int(label.partition("_")[0])) in transport.layers:
            yield label, carry(transport, stream, layer)
