"""Targets of head detection: for each query position, the key positions that a kind of head attends to.

Before, after and earlier are meant among a row's tokens: padding is none of them, even where its id is a token's.
"""

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from hooklens.arguments import Reader, optional, read_numbers, reads, refusal
from hooklens.errors import HookLensError, InputError


def _read_rows(given: object, *, what: str, error: type[HookLensError] = InputError) -> Tensor:
    """Rows of whole numbers, or of marks, one for each column."""
    expected = "rows of whole numbers [batch, pos]"
    rows = read_numbers(given, what=what, expected=expected, error=error)
    if rows.ndim != 2 or rows.is_complex() or not bool((rows.double() == rows.long().double()).all()):
        raise refusal(given, what, expected, error)
    return rows.long()


_ROWS: dict[str, Reader] = {"tokens": _read_rows, "attention_mask": optional(_read_rows)}


@reads(**_ROWS)
def previous_token_target(
    tokens: Int[Tensor, "batch pos"], attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch query key"]:
    """Each query's token before.

    Args:
        tokens: ids.
        attention_mask: 1 for tokens, 0 for padding, which is no query's token before; None: all are tokens.

    Raises:
        InputError: these are no rows of whole numbers, or differ in shape.
    """
    previous, _ = _previous_tokens(tokens, attention_mask)
    return previous[:, :, None] == torch.arange(tokens.shape[1], device=tokens.device)


@reads(**_ROWS)
def duplicate_token_target(
    tokens: Int[Tensor, "batch pos"], attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch query key"]:
    """Earlier positions of each query's token; arguments as in `previous_token_target`."""
    _, real = _previous_tokens(tokens, attention_mask)
    return (tokens[:, :, None] == tokens[:, None, :]).tril(-1) & real[:, :, None] & real[:, None, :]


@reads(**_ROWS)
def induction_target(
    tokens: Int[Tensor, "batch pos"], attention_mask: Shaped[Tensor, "batch pos"] | None = None
) -> Bool[Tensor, "batch query key"]:
    """Positions after earlier ones of each query's token, the query's own left out.

    Arguments as in `previous_token_target`.
    """
    previous, real = _previous_tokens(tokens, attention_mask)
    before = tokens.gather(1, previous.clamp(min=0))
    follows = (tokens[:, :, None] == before[:, None, :]) & (previous >= 0)[:, None, :]
    return follows.tril(-1) & real[:, :, None]


def _previous_tokens(
    tokens: Int[Tensor, "batch pos"], attention_mask: Tensor | None
) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
    """The position of the token before each token, -1 for the first one and for padding; and which are tokens."""
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise InputError(
            f"attention_mask has shape {list(attention_mask.shape)}; expected that of the tokens, {list(tokens.shape)}"
        )
    real = torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    latest = torch.where(real, places, -1).cummax(1).values.roll(1, 1)
    latest[:, :1] = -1
    return torch.where(real, latest, -1), real
