"""Token ids that come from outside: what a network can run, and rows of ids in any form."""

from typing import Any

import torch
from torch import Tensor

from hooklens.errors import InputError

_SHOWN = 10


def check_token_ids(tokens: Tensor, d_vocab: int) -> None:
    """Check that a tensor can be run as token ids `[pos]` or `[batch pos]`.

    Raises:
        InputError: not an integer dtype, no or more than two axes, empty, or ids outside `[0, d_vocab)`.
    """
    # A plain Tensor annotation: any other shape or dtype is for this function to refuse, in its own words.
    if not _is_integer(tokens):
        raise InputError(
            f"token ids have dtype {tokens.dtype}; expected an integer dtype such as torch.int64 "
            "(a residual stream goes in with start_at_layer=)"
        )
    if tokens.ndim not in (1, 2):
        raise InputError(f"token ids have shape {list(tokens.shape)}; expected [pos] or [batch pos]")
    if tokens.numel() == 0:
        raise InputError(f"token ids are empty (shape {list(tokens.shape)}, an empty prompt); give at least one token")
    smallest, largest = torch.aminmax(tokens)
    if int(smallest) >= 0 and int(largest) < d_vocab:
        return
    rows = tokens if tokens.ndim == 2 else tokens[None]
    offenders = ((rows < 0) | (rows >= d_vocab)).nonzero().tolist()
    shown = ", ".join(f"{int(rows[row, pos])} (row {row}, position {pos})" for row, pos in offenders[:_SHOWN])
    more = f" and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
    raise InputError(
        f"token ids outside the vocabulary: {shown}{more}; this model has d_vocab={d_vocab}, ids 0 to {d_vocab - 1}. "
        "Was the text encoded with another model's tokenizer?"
    )


def read_ids(tokens: Any) -> tuple[list[list[int]], bool]:
    """Rows of ids from an int, a tensor or nested lists, and whether they were a batch `[batch pos]`."""
    if isinstance(tokens, int):
        tokens = [tokens]
    if isinstance(tokens, Tensor):
        if not _is_integer(tokens) or tokens.ndim > 2:
            raise InputError(
                f"token ids have shape {list(tokens.shape)} and dtype {tokens.dtype}; "
                "expected integers [pos] or [batch pos]"
            )
        is_batch = tokens.ndim == 2
        rows = tokens.tolist() if is_batch else [tokens.reshape(-1).tolist()]
    else:
        is_batch = len(tokens) > 0 and not isinstance(tokens[0], int)
        rows = [list(row) for row in tokens] if is_batch else [list(tokens)]
    negative = sorted({token for row in rows for token in row if token < 0})
    if negative:
        raise InputError(f"token ids are negative: {', '.join(map(str, negative[:_SHOWN]))}; expected ids from 0 on")
    return rows, is_batch


def _is_integer(tokens: Tensor) -> bool:
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)
