"""Memory for large tensors that are filled at once."""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2**21
"""Bytes of a large page."""

_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)


def empty_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialised contiguous tensor on the host, a large one in pages of 2 MiB where the system has them.

    Memory that a process has not used yet is handed out page by page as it is first written to. In pages of 4 KiB,
    which torch's allocator gets, that takes several times as long as the writing.
    """
    n_entries = math.prod(shape)
    n_bytes = n_entries * dtype.itemsize
    if _ADVICE is None or n_bytes < HUGE_PAGE:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    # Room for a start at a multiple of the page. What follows the last whole one is in small pages: nothing is wasted.
    mapped = mmap.mmap(-1, n_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(mapped, dtype=torch.uint8, count=1).data_ptr() % HUGE_PAGE
    with contextlib.suppress(OSError):
        # A kernel without them gives small ones.
        mapped.madvise(_ADVICE, start, n_bytes // HUGE_PAGE * HUGE_PAGE)
    return torch.frombuffer(mapped, dtype=dtype, count=n_entries, offset=start).view(tuple(shape))
