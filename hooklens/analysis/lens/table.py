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

With a `transport` the stream is carried to the end first, `x_l` replaced by `T_l(x_l)`: by the affine translator of a
tuned lens, or by the mean Jacobian of the layers above. The divergence and the targets are the same, so the numbers
can be laid beside those of the plain lens.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from hooklens.analysis.lens.streams import check_transport, label_streams, list_captured, take_streams, to_columns
from hooklens.analysis.lens.transport import Transport, read_transport
from hooklens.analysis.lens.vocabulary import Summary, summarize
from hooklens.analysis.reading.connection import connect_cache, read_model
from hooklens.analysis.reading.runs import Run, read_run_or_prompt, take_run
from hooklens.analysis.reading.token_columns import choose_tokens
from hooklens.analysis.reading.token_names import name_tokens, read_token
from hooklens.arguments import optional, read_flag, read_int, reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.hooks.choice import Choice
from hooklens.model.stream_reader import StreamReader
from hooklens.optional import import_package

if TYPE_CHECKING:
    import pandas


@reads(
    model=read_model,
    cache=read_run_or_prompt,
    sublayers=read_flag,
    k=partial(read_int, least=1),
    transport=optional(read_transport),
)
@torch.no_grad()
def logit_lens(
    model: HookedCausalLM,
    cache: Run,
    *,
    sublayers: bool = False,
    pos_slice: Choice = -1,
    k: int = 5,
    target: str | int | None = None,
    transport: Transport | None = None,
) -> "pandas.DataFrame":
    """What each layer would predict: one line for each stream, row and position.

    Columns: `stream`; `row` and `pos` (counted over the row's captured tokens); `kl`, KL(final || this) in nats;
    `entropy` in nats; `top_tokens` and `top_probs`, the `k` most likely tokens (text, or ids without a
    tokenizer); with a target `target_logprob` and `target_rank` (0 is the most likely). Padding has no lines.

    A large vocabulary is read in chunks: no tensor `[batch pos d_vocab]` is made.

    Args:
        model: the model of the run.
        cache: a run: text or token ids, or a cache with `resid_pre` of every layer (and `resid_mid`) and the last
            `resid_post`.
        sublayers: read the streams between attention and MLP, too.
        pos_slice: positions over each row's captured tokens (an int, a slice, or a list, array or tensor of ints);
            -1 is a row's last token, whatever padding follows. None: all tokens.
        k: how many tokens to list.
        target: a token to follow, its text or id.
        transport: what carries a stream to the end before it is read, a `TunedLens` or a `JacobianLens`: the streams
            that it was fitted on and the last one have lines. None: every stream is read as it is.

    Raises:
        MissingActivationError: lists the streams that were not captured.
        CacheError, TransformError: the cache, or the transport, is not this model's.
        InputError: `k` is not from 1 to d_vocab, the target is no token, a row lacks a position, which columns are
            padding is not known, or the transport is of another model or does not carry sublayers.
    """
    refuse_other_outputs(model.cfg, "logit_lens lists tokens (read_streams gives the distributions)", InputError)
    d_vocab = model.cfg.d_vocab
    if k > d_vocab:
        raise InputError(f"logit_lens: k={k}; expected 1 to {d_vocab}, the size of the vocabulary")
    target_id = None if target is None else read_token(model, target, what="target")
    ends = ("hook_resid_pre", "hook_resid_post", *(["hook_resid_mid"] if sublayers else []))
    cache = connect_cache(take_run(model, cache, ends), model)
    check_transport(model, transport, sublayers=sublayers)
    tokens, n_captured = list_captured(cache)
    places = choose_tokens(tokens, pos_slice, what="pos_slice")
    taken = take_streams(cache, to_columns(tokens, places), n_captured, sublayers=sublayers)
    *_, (_, final) = label_streams(taken, sublayers=False, transport=None)
    followed = None if target_id is None else torch.full(final.shape[:2], target_id)
    read = summarize(
        StreamReader(model),
        label_streams(taken, sublayers=sublayers, transport=transport),
        final,
        k=k,
        targets=followed,
    )
    records = [record for label, summary in read for record in _describe(model, label, summary, places=places)]
    table: pandas.DataFrame = import_package("pandas").DataFrame(records)
    return table


def _describe(
    model: HookedCausalLM, stream: str, summary: Summary, *, places: list[list[int]]
) -> Iterator[dict[str, object]]:
    """The lines of one stream; rows with fewer positions than others were filled up, and that has no lines."""
    width = max(map(len, places))
    for row, positions in enumerate(places):
        for column, position in enumerate(positions):
            token = row * width + column
            line: dict[str, object] = {
                "stream": stream,
                "row": row,
                "pos": position,
                "kl": float(summary.kl[token]),
                "entropy": float(summary.entropy[token]),
                "top_tokens": name_tokens(model, summary.top[token]),
                "top_probs": tuple(summary.top_logprobs[token].exp().tolist()),
            }
            if summary.target_logprob is not None and summary.target_rank is not None:
                line["target_logprob"] = float(summary.target_logprob[token])
                line["target_rank"] = int(summary.target_rank[token])
            yield line
