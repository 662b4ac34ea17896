"""How many continuations run at once: as many as a share of the free memory holds."""

import os
from collections.abc import Iterator, Sequence
from typing import Literal

import torch

from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import InputError

BatchSize = int | Literal["auto"]

# Past a few hundred rows the matrix products are as efficient as they get.
_MOST_ROWS = 512
_MOST_BYTES = 2**30
_SHARE_OF_FREE_MEMORY = 0.25


def check_batch_size(batch_size: BatchSize) -> None:
    """Check what a caller gave.

    Raises:
        InputError: it is neither `"auto"` nor a positive integer.
    """
    if batch_size != "auto" and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise InputError(f"batch_size is {batch_size!r}; expected 'auto' or an integer >= 1")


def estimate_bytes_per_token(model: HookedCausalLM, n_prefix: int) -> int:
    """An upper estimate of what a call on a shared prefix allocates for each token of a continuation.

    - logits and their log-sum, in float32 at least: `3 * d_vocab` numbers;
    - the stream, the normed stream and what one block adds: `8 * d_model + 3 * d_mlp + 6 * n_heads * d_head`
      numbers (blocks run one after another, so depth does not count);
    - attention over the prefix where it is computed explicitly (accelerators, soft caps): `3 * n_heads *
      n_prefix` numbers, else a mask for sliding windows, `2 * n_prefix` numbers.
    """
    cfg = model.cfg
    itemsize = model.dtype.itemsize
    logits = 3 * cfg.d_vocab * max(itemsize, 4)
    block = (8 * cfg.d_model + 3 * cfg.d_mlp + 6 * cfg.n_heads * cfg.d_head) * itemsize
    explicit = model.device.type != "cpu" or cfg.attn_softcap is not None
    attention = (3 * cfg.n_heads if explicit else 2) * n_prefix * itemsize
    return logits + block + attention


def choose_batch_size(model: HookedCausalLM, n_prefix: int, width: int) -> int:
    """Rows of `width` tokens that fit a quarter of the free memory, at most 1 GiB and 512 rows; at least one."""
    budget = min(_MOST_BYTES, int(_SHARE_OF_FREE_MEMORY * _free_memory(model.device)))
    return max(1, min(_MOST_ROWS, budget // (estimate_bytes_per_token(model, n_prefix) * max(width, 1))))


def plan_batches(
    model: HookedCausalLM, lengths: Sequence[int], *, n_prefix: int, batch_size: BatchSize
) -> Iterator[list[int]]:
    """Indices of rows that run together: rows of similar length, the longest first.

    Padding is little, and memory that does not suffice shows at once.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    start = 0
    while start < len(order):
        width = lengths[order[start]]
        size = choose_batch_size(model, n_prefix, width) if batch_size == "auto" else batch_size
        yield order[start : start + size]
        start += size


def _free_memory(device: torch.device) -> int:
    """Bytes; four times the largest budget where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 * _MOST_BYTES
