"""How many tokens a pass may run at once, and how many pairs a baseline may hold, by memory."""

from typing import Literal

from hooklens.arguments import Error, read_int, show
from hooklens.causal_lm import HookedCausalLM
from hooklens.causal_lm.memory.free import assume_free_bytes
from hooklens.errors import InputError

BatchSize = int | Literal["auto"]

# Past some thousand tokens a pass is no faster per token, and its tensors only leave the caches.
_TOKENS_ON_CPU = 4096
_SHARE_OF_FREE_MEMORY = 0.25


def read_batch_size(given: object, *, what: str = "batch_size", error: Error = InputError) -> BatchSize:
    """`"auto"`, or a number of rows.

    Raises:
        InputError: something else.
    """
    if isinstance(given, str) and given == "auto":
        return "auto"
    try:
        return read_int(given, what=what, least=1, error=error)
    except error:
        raise error(f"{what} is {show(given)}; expected 'auto' or a number of rows >= 1") from None


def check_batch_size(batch_size: BatchSize) -> None:
    """Refuse what is neither `"auto"` nor a number of rows.

    Raises:
        InputError: it is something else.
    """
    read_batch_size(batch_size)


def tokens_per_pass(model: HookedCausalLM, width: int, n_reads: int, *, watches_pattern: bool) -> int:
    """How many tokens to run at once.

    Args:
        model: the model.
        width: columns of a row.
        n_reads: positions per row whose logits are made.
        watches_pattern: whether scores or patterns are made explicit.
    """
    cfg = model.cfg
    of_stream = 6 * cfg.d_model + 3 * cfg.n_heads * cfg.d_head + (3 if cfg.gated_mlp else 2) * cfg.mlp_width
    # Keys are at most a past and a row; the mask is made twice, the scores three times.
    of_attention = 2 * width * (3 * cfg.n_heads if watches_pattern else 2)
    of_logits = 3 * n_reads * cfg.d_vocab // width
    bytes_per_token = (of_stream + of_attention + of_logits) * model.dtype.itemsize
    limit = int(_SHARE_OF_FREE_MEMORY * assume_free_bytes(model.device)) // bytes_per_token
    return max(width, min(limit, _TOKENS_ON_CPU) if model.device.type == "cpu" else limit)


def pairs_per_group(model: HookedCausalLM, width: int, names: list[str], n_reads: int) -> int:
    """How many pairs' unpatched runs to hold at once.

    Args:
        model: the model.
        width: columns of a prompt.
        names: the hook points whose activations are held.
        n_reads: positions whose logits are held.
    """
    cfg = model.cfg
    streams = 2 * (cfg.n_layers + 1) * width * cfg.d_model
    keys_values = 2 * width * cfg.cache_width
    widest = max(cfg.d_model, cfg.n_heads * cfg.d_head, cfg.mlp_width, cfg.n_heads * width)
    held = 3 * len(names) * width * widest + 6 * n_reads * cfg.d_vocab
    bytes_per_pair = (streams + keys_values + held) * model.dtype.itemsize
    return max(1, int(_SHARE_OF_FREE_MEMORY * assume_free_bytes(model.device)) // bytes_per_pair)
