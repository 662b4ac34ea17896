"""How many continuations run at once: as many as a share of the free memory holds."""

from collections.abc import Iterator, Sequence
from typing import Literal

from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.free import assume_free_bytes
from hooklens.config import AlibiPositions
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


def estimate_bytes_per_token(model: HookedCausalLM, n_prefix: int, width: int) -> int:
    """An upper bound of what a call on a shared prefix allocates, for each token of its rows, padding included.

    Every token has `n_prefix + width` keys, and with w bytes in a number, 4 at least where sums are taken:

    - logits, widened, and what their log-sum exponentiates: `4 * d_vocab` numbers;
    - the stream, norms and what one block adds: `12 * d_model + 6 * mlp_width + 10 * n_heads * d_head` numbers (blocks
      run one after another, so depth does not count);
    - which keys each token sees, where rows differ in length or a window hides some: two masks of booleans and two of
      numbers for every width of window, `(2 + 2 * w)` bytes a key;
    - for ALiBi a bias, and where attention is computed explicitly (accelerators, soft caps) scores, in `3` and `5`
      tensors of `n_heads` numbers a key.

    Args:
        model: runs.
        n_prefix: tokens of the prefix.
        width: tokens of the longest row.
    """
    cfg = model.cfg
    itemsize = model.dtype.itemsize
    wide = max(itemsize, 4)
    n_key = n_prefix + width
    logits = 4 * cfg.d_vocab * wide
    block = (12 * cfg.d_model + 6 * cfg.mlp_width + 10 * cfg.n_heads * cfg.d_head) * wide
    n_masks = len({None, *(cfg.windows or ())}) + len({*(cfg.chunks or ())} - {None})
    masks = n_masks * n_key * (2 + 2 * itemsize)
    positions = cfg.positions if isinstance(cfg.positions, tuple) else (cfg.positions,)
    biases = 3 * cfg.n_heads * n_key * wide if any(isinstance(one, AlibiPositions) for one in positions) else 0
    explicit = model.device.type != "cpu" or cfg.attn_softcap is not None or cfg.attention_backend != "auto"
    scores = 5 * cfg.n_heads * n_key * wide if explicit else 0
    return logits + block + masks + biases + scores


def estimate_bytes_for_prefix(model: HookedCausalLM, n_prefix: int) -> int:
    """An upper bound of what a call allocates for the shared prefix, however many rows stand behind it.

    Keys and values of one layer, dense and for every query head where kernels want them so.
    """
    cfg = model.cfg
    return 2 * n_prefix * cfg.n_heads * cfg.d_head * max(model.dtype.itemsize, 4)


def choose_batch_size(model: HookedCausalLM, n_prefix: int, width: int) -> int:
    """Rows of `width` tokens that fit a quarter of the free memory, at most 1 GiB and 512 rows; at least one."""
    budget = min(_MOST_BYTES, int(_SHARE_OF_FREE_MEMORY * assume_free_bytes(model.device)))
    per_row = estimate_bytes_per_token(model, n_prefix, width) * max(width, 1)
    return max(1, min(_MOST_ROWS, (budget - estimate_bytes_for_prefix(model, n_prefix)) // per_row))


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
