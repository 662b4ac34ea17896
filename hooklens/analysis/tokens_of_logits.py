"""The likeliest next tokens at one position, as a table."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hooklens.arguments import optional, read_int, reads
from hooklens.errors import InputError
from hooklens.optional import import_package
from hooklens.precision import widen
from hooklens.tokens import Tokenizer, to_single_str_token

if TYPE_CHECKING:
    import pandas


@reads(k=optional(read_int))
def logits_to_frame(logits: Tensor, tokenizer: Tokenizer | None = None, *, k: int | None = 10) -> "pandas.DataFrame":
    """The tokens with the largest logits, largest first.

    Args:
        logits: `[d_vocab]`, of one position: `logits[row, position]`.
        tokenizer: gives their texts; None: ids only.
        k: how many; None: all.

    Returns:
        Columns `token` (its id), `text` with a tokenizer, `logit`, `logprob` in nats, and `probability`.

    Raises:
        InputError: logits of several positions, or `k` below 1.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 1:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"logits_to_frame: logits are {found}; expected those of one position, [d_vocab]")
    if k is not None and k < 1:
        raise InputError(f"logits_to_frame: k={k}; expected 1 or more, or None for all tokens")
    wide = widen(logits.detach())
    best = wide.argsort(descending=True, stable=True)[:k]
    logprobs = torch.log_softmax(wide, 0)[best].tolist()
    columns: dict[str, list[object]] = {"token": best.tolist()}
    if tokenizer is not None:
        columns["text"] = [
            to_single_str_token(tokenizer, token) if token < len(tokenizer) else "" for token in best.tolist()
        ]
    columns |= {"logit": wide[best].tolist(), "logprob": logprobs, "probability": torch.tensor(logprobs).exp().tolist()}
    table: pandas.DataFrame = import_package("pandas").DataFrame(columns)
    return table
