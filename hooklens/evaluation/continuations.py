"""The log-probability of many continuations of one prefix, as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hooklens import tokens as tokenization
from hooklens.arguments import reads
from hooklens.causal_lm import HookedCausalLM
from hooklens.config import refuse_other_outputs
from hooklens.errors import InputError
from hooklens.evaluation.batching import BatchSize, check_batch_size
from hooklens.evaluation.prefix import (
    Text,
    encode_continuations,
    encode_prefix,
    run_prefix,
)
from hooklens.evaluation.scoring import RowScore, check_context, score_rows
from hooklens.hooks.edits import Edit
from hooklens.optional import import_package
from hooklens.progress import progress_bar

if TYPE_CHECKING:
    import pandas


@reads()
def score_continuations(
    model: HookedCausalLM,
    prefix: Text,
    continuations: Sequence[Text],
    *,
    batch_size: BatchSize = "auto",
    edits: Sequence[Edit] = (),
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> "pandas.DataFrame":
    r"""Score continuations of a prefix; the prefix runs once.

    A continuation that is text is encoded together with the prefix, and what follows the prefix's tokens is scored; no
    special token is added. Where a continuation and the spaces at the prefix's end make tokens together, all
    continuations begin before those spaces (as in lm-evaluation-harness), and `tokens` shows them. A continuation that
    begins inside a token of the whole is refused.

    Edits act as on the full sequence. Those that may act on several tokens at once (`Custom`, `Mean`, several
    positions, positions from the end, attention scores and patterns) make each full sequence run alone.

    Args:
        model: scores.
        prefix: text, or token ids `[pos]` or `[1 pos]`.
        continuations: texts or rows of token ids, mixed as you like.
        batch_size: rows at once; `"auto"` by memory, see `batching.estimate_bytes_per_token`.
        edits: values from `hooklens.edits`; they name no rows.
        prepend_bos: for a prefix that is text; None is the model's `default_prepend_bos`.
        progress: show a progress bar.

    Returns:
        A row per continuation, in the order given: `index`; `continuation`, its text (None for ids without one);
        `tokens`, its ids; `n_tokens`; `n_bytes`, of the text in UTF-8; `logprob`, the sum in nats;
        `logprob_per_token`; `logprob_per_byte` (NaN without a text); `token_logprobs`; `is_greedy`, whether it is
        what greedy decoding gives.

    Raises:
        InputError: no continuation, empty ones, or such as do not go on from the prefix or do not fit the context
            (all are named).
    """
    check_batch_size(batch_size)
    refuse_other_outputs(model.cfg, "score_continuations", InputError)
    check_continuations(continuations)
    begun = encode_prefix(model, prefix, edits=edits, prepend_bos=prepend_bos)
    start, rows = encode_continuations(model, begun, continuations)
    check_context(model, len(start), [len(row) for row in rows])
    ready = run_prefix(model, start)
    scores: dict[int, RowScore] = {}
    with progress_bar("scoring", total=len(rows), unit="row", progress=progress) as bar:
        for batch in score_rows(model, ready, rows, batch_size=batch_size):
            scores.update(batch)
            bar.update(len(batch))
    records = [
        {"index": i, **describe_score(model, continuations[i], rows[i], scores[i])} for i in range(len(continuations))
    ]
    table: pandas.DataFrame = import_package("pandas").DataFrame(records)
    return table


def check_continuations(continuations: Sequence[Text]) -> None:
    """Check that there is a list of continuations.

    Raises:
        InputError: it is one text, or empty.
    """
    if isinstance(continuations, str):
        raise InputError("continuations is one string; give a list of them")
    if not len(continuations):
        raise InputError("there is no continuation to score; give at least one")


def describe_score(model: HookedCausalLM, text: Text, tokens: Sequence[int], score: RowScore) -> dict[str, Any]:
    """A continuation's score as a record of plain values."""
    shown: str | None = None
    if isinstance(text, str):
        shown = text
    elif model.tokenizer is not None and all(tokenization.knows_id(model.tokenizer, token) for token in tokens):
        shown = str(model.to_string(list(tokens)))
    n_bytes = 0 if shown is None else len(shown.encode())
    return {
        "continuation": shown,
        "tokens": list(tokens),
        "n_tokens": len(tokens),
        "n_bytes": n_bytes,
        "logprob": score.total,
        "logprob_per_token": score.total / len(tokens),
        "logprob_per_byte": score.total / n_bytes if n_bytes else float("nan"),
        "token_logprobs": score.logprobs,
        "is_greedy": score.is_greedy,
    }
