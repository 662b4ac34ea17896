"""The largest entries of a matrix too large to make: which token promotes which, through a circuit.

`W_E W_V W_O W_U` of a head says how much attending to one token raises the logit of another (Elhage et al.
2021). It has d_vocab x d_vocab entries and rank d_head; `top_tokens` streams over it.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.weights.factored import FactoredMatrix


class TopEntries(NamedTuple):
    """The largest entries of a matrix, in descending order.

    Attributes:
        values: the entries.
        rows: their rows.
        columns: their columns.
    """

    values: Float[Tensor, " k"]
    rows: Int[Tensor, " k"]
    columns: Int[Tensor, " k"]


# Entries of a block by default: 64 MiB in float32.
_BLOCK_ENTRIES = 2**24


def top_tokens(
    matrix: FactoredMatrix | Float[Tensor, "rows columns"], k: int, *, block: int | None = None
) -> TopEntries:
    """The `k` largest entries of a matrix, of a d_vocab x d_vocab circuit say, without making all of it.

    Blocks of rows are multiplied out one after the other. Within a block only the `k` rows with the largest
    maxima can hold any of its `k` largest entries, so only these are searched. For the smallest entries ask
    for `-1 * matrix`.

    Args:
        matrix: one matrix; index the leading axes of a batch first.
        k: how many entries.
        block: rows made at a time; None: as many as give about 16 million entries.

    Raises:
        InputError: leading axes, or `k` or `block` out of range.
    """
    n_rows, n_columns = _check_top_tokens(matrix, k, block)
    rows_at_once = block or max(1, _BLOCK_ENTRIES // n_columns)
    best: TopEntries | None = None
    for start in range(0, n_rows, rows_at_once):
        part = matrix[start : start + rows_at_once]
        entries = part.AB if isinstance(part, FactoredMatrix) else part
        found = _top_entries(entries, k, first_row=start)
        if best is not None:
            merged = TopEntries(*(torch.cat(pair) for pair in zip(best, found, strict=True)))
            order = merged.values.topk(min(k, merged.values.numel())).indices
            found = TopEntries(*(column[order] for column in merged))
        best = found
    assert best is not None
    return best


def _check_top_tokens(matrix: FactoredMatrix | Tensor, k: int, block: int | None) -> tuple[int, int]:
    shape = tuple(matrix.shape)
    if len(shape) != 2:
        raise InputError(f"top_tokens: shape {shape}; expected one matrix, so index the leading axes first")
    n_rows, n_columns = shape
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise InputError(f"top_tokens: k={k!r}; expected a number of entries")
    if not 1 <= k <= n_rows * n_columns:
        raise InputError(f"top_tokens: k={k}; expected 1 to {n_rows * n_columns}, the entries of a {shape} matrix")
    if isinstance(block, bool) or not isinstance(block, int | np.integer | None) or (block is not None and block < 1):
        raise InputError(f"top_tokens: block={block!r}; expected at least one row")
    return n_rows, n_columns


def _top_entries(entries: Float[Tensor, "rows columns"], k: int, *, first_row: int) -> TopEntries:
    rows = entries.amax(dim=1).topk(min(k, entries.shape[0])).indices
    candidates = entries[rows]
    values, places = candidates.flatten().topk(min(k, candidates.numel()))
    n_columns = entries.shape[1]
    return TopEntries(values, rows[places // n_columns] + first_row, places % n_columns)
