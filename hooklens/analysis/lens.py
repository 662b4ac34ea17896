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
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from hooklens.activation_cache import ActivationCache
from hooklens.activation_cache.stream import locate
from hooklens.analysis.connection import connect_cache, find_real_positions
from hooklens.analysis.token_names import name_tokens
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.precision import widen

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


@torch.no_grad()
def read_streams(
    model: HookedCausalLM,
    cache: ActivationCache,
    *,
    sublayers: bool = False,
    pos_slice: slice | list[int] | None = None,
) -> Iterator[LensReading]:
    """The predictions of every stream, one after the other, so that only one holds memory.

    Args:
        model: the model of the run.
        cache: a cache with `resid_pre` of every layer (and `resid_mid`) and the last `resid_post`.
        sublayers: read the streams between attention and MLP, too.
        pos_slice: positions, counted over the captured ones; None is all.

    Raises:
        MissingActivationError: lists the streams that were not captured.
        CacheError, TransformError: the cache is not this model's.
    """
    for label, stream in _label_streams(model, cache, sublayers=sublayers, pos_slice=pos_slice):
        yield LensReading(label, _predict(model, stream))


def _label_streams(
    model: HookedCausalLM, cache: ActivationCache, *, sublayers: bool, pos_slice: slice | list[int] | None
) -> list[tuple[str, Float[Tensor, "batch pos d_model"]]]:
    cache = connect_cache(cache, model)
    streams, labels = cache.accumulated_resid(incl_mid=sublayers, pos_slice=pos_slice, return_labels=True)
    return list(zip(labels, streams if cache.has_batch_dim else streams[:, None], strict=True))


def _predict(model: HookedCausalLM, stream: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
    """The model's end on a stream; hook points do not fire."""
    normed = model.ln_final.apply_weights(stream.to(model.device, model.dtype))
    logits = F.linear(normed, model.W_U.T, model.unembed.b_U)
    if (cap := model.cfg.logits_softcap) is not None:
        logits = cap * torch.tanh(logits / cap)
    return widen(logits).log_softmax(-1)


@torch.no_grad()
def logit_lens(
    model: HookedCausalLM,
    cache: ActivationCache,
    *,
    sublayers: bool = False,
    pos_slice: int | slice | list[int] | None = -1,
    k: int = 5,
    target: str | int | None = None,
) -> "pandas.DataFrame":
    """What each layer would predict: one line for each stream, row and position.

    Columns: `stream`; `row` and `pos` (counted over the captured positions); `kl`, KL(final || this) in nats;
    `entropy` in nats; `top_tokens` and `top_probs`, the `k` most likely tokens (text, or ids without a
    tokenizer); with a target `target_logprob` and `target_rank` (0 is the most likely). Padding is left out.

    Args:
        model: the model of the run.
        cache: a cache with `resid_pre` of every layer (and `resid_mid`) and the last `resid_post`.
        sublayers: read the streams between attention and MLP, too.
        pos_slice: positions; the last one only, unless given.
        k: how many tokens to list.
        target: a token to follow.

    Raises:
        MissingActivationError: lists the streams that were not captured.
        CacheError, TransformError: the cache is not this model's.
        InputError: `k` is not from 1 to d_vocab, the target is no token, or which positions are padding is not known.
    """
    d_vocab = model.cfg.d_vocab
    if not 1 <= k <= d_vocab:
        raise InputError(f"logit_lens: k={k}; expected 1 to {d_vocab}, the size of the vocabulary")
    target_id = model.to_single_token(target) if isinstance(target, str) else target
    if target_id is not None and not 0 <= target_id < d_vocab:
        raise InputError(f"logit_lens: target={target_id}; expected a token id from 0 to {d_vocab - 1}")
    positions = [pos_slice] if isinstance(pos_slice, int) else pos_slice
    streams = _label_streams(model, cache, sublayers=sublayers, pos_slice=positions)
    final = _predict(model, streams[-1][1])
    n_captured = locate(cache.cfg, None).read(cache).shape[-2]
    numbers = _number_positions(n_captured, positions)
    real = find_real_positions(cache, n_captured)
    keep = torch.ones(final.shape[:2], dtype=torch.bool) if real is None else real[:, numbers].cpu()
    records = [
        record
        for label, stream in streams
        for record in _describe(
            model, LensReading(label, _predict(model, stream)), final, numbers=numbers, keep=keep, k=k, target=target_id
        )
    ]
    table: pandas.DataFrame = import_package("pandas").DataFrame(records)
    return table


def _describe(
    model: HookedCausalLM,
    reading: LensReading,
    final: Float[Tensor, "batch pos d_vocab"],
    *,
    numbers: list[int],
    keep: Bool[Tensor, "batch pos"],
    k: int,
    target: int | None,
) -> Iterator[dict[str, object]]:
    logprobs = reading.logprobs
    divergence = F.kl_div(logprobs, final, reduction="none", log_target=True).sum(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    top = logprobs.topk(k)
    for row in range(len(logprobs)):
        for column, number in enumerate(numbers):
            if not keep[row, column]:
                continue
            line: dict[str, object] = {
                "stream": reading.stream,
                "row": row,
                "pos": number,
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


def _number_positions(n_captured: int, positions: slice | list[int] | None) -> list[int]:
    everything = list(range(n_captured))
    if positions is None:
        return everything
    return everything[positions] if isinstance(positions, slice) else [everything[index] for index in positions]
