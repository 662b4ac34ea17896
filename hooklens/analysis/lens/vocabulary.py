r"""What distributions over a large vocabulary say, without holding one of them whole for all tokens.

Logits are made for some tokens and a chunk of the vocabulary at a time. A first pass over the chunks takes the
normaliser, `log sum_t exp z(t)`, chunk by chunk into one (the streamed log-sum-exp), and merges the largest logits;
a second one, which knows both normalisers, adds up

    KL(p || q) = sum over t of p(t) (log p(t) - log q(t)),      H(q) = - sum over t of q(t) log q(t)

and counts the tokens that are likelier than the target. Where the vocabulary fits into one chunk its logits are kept
for the second pass, and the numbers are those of `log_softmax` to the last bit.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.model.stream_reader import StreamReader

CHUNK = 2**15
"""Outputs at a time."""

MOST_LOGITS = 2**24
"""Logits at a time: 64 MiB in float32."""


class Summary(NamedTuple):
    """What the distributions at some tokens say.

    Attributes:
        kl: KL(final || this) in nats.
        entropy: in nats.
        top: the likeliest outputs, the likeliest first.
        top_logprobs: their log-probabilities.
        target_logprob: that of the target; None: there is none.
        target_rank: how many outputs are likelier; 0 is the likeliest.
    """

    kl: Float[Tensor, " token"]
    entropy: Float[Tensor, " token"]
    top: Int[Tensor, "token k"]
    top_logprobs: Float[Tensor, "token k"]
    target_logprob: Float[Tensor, " token"] | None
    target_rank: Int[Tensor, " token"] | None


class _Block:
    """The logits of some tokens, in chunks of the outputs; those of a single chunk are kept where that is wanted."""

    def __init__(
        self, reader: StreamReader, stream: Float[Tensor, "token d_model"], chunk: int, *, keeps: bool = True
    ) -> None:
        self._reader = reader
        self._keeps = keeps
        self._normed = reader.normalize(stream)
        self._chunk = chunk
        self._kept: Tensor | None = None

    def parts(self) -> Iterator[tuple[int, Float[Tensor, "token output"]]]:
        """Each chunk of the logits, behind the number of its first output."""
        n = self._reader.n_outputs
        if n <= self._chunk:
            logits = self._reader.unembed(self._normed) if self._kept is None else self._kept
            self._kept = logits if self._keeps else None
            yield 0, logits
            return
        for start in range(0, n, self._chunk):
            outputs = torch.arange(start, min(start + self._chunk, n), device=self._normed.device)
            yield start, self._reader.unembed(self._normed, outputs)


class _Totals(NamedTuple):
    """What the first pass gives."""

    normaliser: Float[Tensor, " token"]
    top: Int[Tensor, "token k"]
    top_logits: Float[Tensor, "token k"]
    target_logits: Float[Tensor, " token"] | None


def summarize(
    reader: StreamReader,
    streams: Iterable[tuple[str, Float[Tensor, "batch pos d_model"]]],
    final: Float[Tensor, "batch pos d_model"],
    *,
    k: int,
    targets: Int[Tensor, "batch pos"] | None = None,
    chunk: int | None = None,
) -> Iterator[tuple[str, Summary]]:
    """What each stream says at each token, beside what the last one does.

    Args:
        reader: reads streams as logits.
        streams: by name, taken one after the other.
        final: the last stream.
        k: how many of the likeliest outputs.
        targets: an output to follow at each token.
        chunk: outputs at a time; None: `CHUNK`, or all where parts of the unembedding cost as much as all of it.
    """
    size = reader.n_outputs if not reader.takes_parts else chunk or CHUNK
    n_tokens = max(1, MOST_LOGITS // min(size, reader.n_outputs))
    lasts = torch.split(final.flatten(0, 1), n_tokens)
    ends = [_Normalised(_Block(reader, part, size, keeps=len(lasts) == 1)) for part in lasts]
    wanted = None if targets is None else torch.split(targets.flatten().to(final.device), n_tokens)
    for name, stream in streams:
        parts = torch.split(stream.flatten(0, 1), n_tokens)
        found = [
            _summarize_block(_Block(reader, part, size), end, k, None if wanted is None else wanted[place])
            for place, (part, end) in enumerate(zip(parts, ends, strict=True))
        ]
        yield name, _join(found)


class _Normalised:
    """The last stream's logits with their normaliser, which all streams are compared with."""

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.normaliser = _find_normaliser(block)


def _find_normaliser(block: _Block) -> Float[Tensor, " token"]:
    total: Tensor | None = None
    for _, logits in block.parts():
        part = logits.logsumexp(-1)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    return total


def _summarize_block(block: _Block, end: _Normalised, k: int, targets: Int[Tensor, " token"] | None) -> Summary:
    totals = _first_pass(block, k, targets)
    normaliser = totals.normaliser[:, None]
    kl = torch.zeros_like(totals.normaliser)
    entropy, rank = torch.zeros_like(kl), torch.zeros_like(kl, dtype=torch.long)
    for (_, logits), (_, final) in zip(block.parts(), end.block.parts(), strict=True):
        logprobs = logits - normaliser
        kl += F.kl_div(logprobs, final - end.normaliser[:, None], reduction="none", log_target=True).sum(-1)
        entropy -= (logprobs.exp() * logprobs).sum(-1)
        if totals.target_logits is not None:
            rank += (logits > totals.target_logits[:, None]).sum(-1)
    has_target = totals.target_logits is not None
    return Summary(
        kl=kl,
        entropy=entropy,
        top=totals.top,
        top_logprobs=totals.top_logits - normaliser,
        target_logprob=totals.target_logits - totals.normaliser if totals.target_logits is not None else None,
        target_rank=rank if has_target else None,
    )


def _first_pass(block: _Block, k: int, targets: Int[Tensor, " token"] | None) -> _Totals:
    normaliser: Tensor | None = None
    best: tuple[Tensor, Tensor] | None = None
    followed: Tensor | None = None
    for start, logits in block.parts():
        part = logits.logsumexp(-1)
        normaliser = part if normaliser is None else torch.logaddexp(normaliser, part)
        found = logits.topk(min(k, logits.shape[-1]))
        values, outputs = found.values, found.indices + start
        if best is not None:
            values, outputs = torch.cat([best[0], values], -1), torch.cat([best[1], outputs], -1)
            merged = values.topk(min(k, values.shape[-1]))
            values, outputs = merged.values, outputs.gather(-1, merged.indices)
        best = (values, outputs)
        if targets is not None:
            own = targets.to(logits.device) - start
            here = (own >= 0) & (own < logits.shape[-1])
            picked = logits.gather(-1, own.clamp(0, logits.shape[-1] - 1)[:, None])[:, 0]
            followed = picked if followed is None else torch.where(here, picked, followed)
    assert normaliser is not None
    assert best is not None
    return _Totals(normaliser, best[1], best[0], followed)


def _join(found: list[Summary]) -> Summary:
    """The summaries of blocks of tokens, one after the other."""
    columns: list[Any] = [
        None if any(one is None for one in column) else torch.cat([one for one in column if one is not None])
        for column in zip(*found, strict=True)
    ]
    return Summary(*columns)
