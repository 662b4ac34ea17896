"""The likeliest next tokens at one position, or where given ones stand among them, as a table."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hooklens.arguments import optional, read_int, reads, refusal
from hooklens.errors import HookLensError, InputError
from hooklens.optional import import_package
from hooklens.precision import widen
from hooklens.tokens import Tokenizer, to_single_str_token, to_single_token
from hooklens.tokens.ids import is_token_id

if TYPE_CHECKING:
    import pandas

AskedTokens = Sequence[int | str] | Tensor


def _read_asked(given: object, *, what: str, error: type[HookLensError] = InputError) -> list[int | str]:
    """Token ids, or texts of one token."""
    entries = given.tolist() if isinstance(given, Tensor) and given.ndim == 1 else given
    if (
        not isinstance(entries, list | tuple)
        or not entries
        or not all(isinstance(one, str) or is_token_id(one) for one in entries)
    ):
        raise refusal(given, what, "a list of token ids or of texts that are one token", error)
    return list(entries)


@reads(k=optional(read_int), tokens=optional(_read_asked))
def logits_to_frame(
    logits: Tensor, tokenizer: Tokenizer | None = None, *, k: int | None = 10, tokens: AskedTokens | None = None
) -> "pandas.DataFrame":
    """The tokens with the largest logits, largest first, or those that are asked for, by their ranks.

    Args:
        logits: `[d_vocab]`, of one position: `logits[row, position]`.
        tokenizer: gives their texts; None: ids only.
        k: how many; None: all.
        tokens: these instead, in this order: ids, or texts that are one token, space included.

    Returns:
        The index `rank`, how many tokens are likelier (of equal ones those with smaller ids are); columns `token` (its
        id), `text` with a tokenizer, `logit`, `logprob` in nats, and `probability`.

    Raises:
        InputError: logits of several positions, `k` below 1, or tokens that there are none of.
    """
    if not isinstance(logits, Tensor) or logits.ndim != 1:
        found = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(f"logits_to_frame: logits are {found}; expected those of one position, [d_vocab]")
    if k is not None and k < 1:
        raise InputError(f"logits_to_frame: k={k}; expected 1 or more, or None for all tokens")
    wide = widen(logits.detach())
    order = wide.argsort(descending=True, stable=True)
    if tokens is None:
        shown = order[:k]
        ranks = list(range(len(shown)))
    else:
        shown = torch.tensor(_find_ids(tokens, tokenizer, len(wide)), device=wide.device)
        ranks = order.argsort()[shown].tolist()
    logprobs = torch.log_softmax(wide, 0)[shown].tolist()
    columns: dict[str, list[object]] = {"token": shown.tolist()}
    if tokenizer is not None:
        columns["text"] = [
            to_single_str_token(tokenizer, token) if token < len(tokenizer) else "" for token in shown.tolist()
        ]
    columns |= {
        "logit": wide[shown].tolist(),
        "logprob": logprobs,
        "probability": torch.tensor(logprobs).exp().tolist(),
    }
    package = import_package("pandas")
    table: pandas.DataFrame = package.DataFrame(columns, index=package.Index(ranks, name="rank"))
    return table


def _find_ids(tokens: AskedTokens, tokenizer: Tokenizer | None, d_vocab: int) -> list[int]:
    texts = [one for one in tokens if isinstance(one, str)]
    if texts and tokenizer is None:
        raise InputError(
            f"logits_to_frame: tokens holds the text {texts[0]!r}, which needs a tokenizer; give ids or one"
        )
    ids = [to_single_token(tokenizer, one) if isinstance(one, str) and tokenizer else int(one) for one in tokens]
    if unknown := [one for one in ids if not 0 <= one < d_vocab]:
        raise InputError(f"logits_to_frame: tokens holds {unknown}; expected ids from 0 to {d_vocab - 1}")
    return ids
