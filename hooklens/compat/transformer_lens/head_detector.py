"""`transformer_lens.head_detector` of 2.x: how much each head attends as a pattern says."""

import logging
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hooklens.compat.transformer_lens.utils import is_lower_triangular, is_square

HeadName = Literal["previous_token_head", "duplicate_token_head", "induction_head"]
ErrorMeasure = Literal["abs", "mul"]
HEAD_NAMES: tuple[str, ...] = get_args(HeadName)
LayerHeadTuple, LayerToHead = tuple[int, int], dict[int, list[int]]
INVALID_HEAD_NAME_ERR = f"detection_pattern must be a Tensor or one of head names: {HEAD_NAMES}; got %s"
SEQ_LEN_ERR = "The sequence must be non-empty and must fit within the model's context window."
DET_PAT_NOT_SQUARE_ERR = (
    "The detection pattern must be a lower triangular matrix of shape (sequence_length, sequence_length); "
    "sequence_length=%d; got detection patern of shape %s"
)


def detect_head(
    model: Any, seq: str | list[str], detection_pattern: Tensor | str,
    heads: list[tuple[int, int]] | dict[int, list[int]] | None = None, cache: Any = None, *,
    exclude_bos: bool = False, exclude_current_token: bool = False, error_measure: str = "mul",
) -> Tensor:  # fmt: skip
    """A score for each head, `[layer head]`, -1 for those not asked for; of several texts the mean.

    `"mul"`: the share of attention on the pattern's ones. `"abs"`: 1 less the mean absolute difference of a row.
    """
    tokens = model.to_tokens(seq)
    n_pos = tokens.shape[-1]
    assert error_measure in ("abs", "mul"), f"Invalid error_measure={error_measure}; valid values are 'abs' and 'mul'"
    measure: dict[str, Any] = {
        "exclude_bos": exclude_bos,
        "exclude_current_token": exclude_current_token,
        "error_measure": error_measure,
    }
    if isinstance(detection_pattern, str):
        assert detection_pattern in HEAD_NAMES, INVALID_HEAD_NAME_ERR % detection_pattern
        if isinstance(seq, list):
            return torch.stack([detect_head(model, one, detection_pattern, heads, **measure) for one in seq]).mean(0)
        detection_pattern = _PATTERNS[detection_pattern](tokens.cpu()).to(tokens.device)
    if error_measure == "mul" and not bool(((detection_pattern == 0) | (detection_pattern == 1)).all()):
        logging.warning("error_measure 'mul' takes a detection pattern of zeros and ones; this one has other values")
    assert 1 < n_pos < model.cfg.n_ctx, SEQ_LEN_ERR
    fits = is_lower_triangular(detection_pattern) and n_pos == detection_pattern.shape[0]
    assert fits, DET_PAT_NOT_SQUARE_ERR % (n_pos, detection_pattern.shape)
    if cache is None:
        names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
        _, cache = model.run_with_cache(tokens, remove_batch_dim=True, names_filter=names)
    if heads is None:
        heads = {layer: list(range(model.cfg.n_heads)) for layer in range(model.cfg.n_layers)}
    chosen = (
        [(layer, head) for layer, several in heads.items() for head in several] if isinstance(heads, dict) else heads
    )
    scores = -torch.ones(model.cfg.n_layers, model.cfg.n_heads, dtype=model.cfg.dtype)
    for layer, head in chosen:
        pattern = cache["pattern", layer, "attn"][head]
        scores[layer, head] = compute_head_attention_similarity_score(pattern, detection_pattern, **measure)
    return scores


def get_previous_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """Ones on the token before."""
    return torch.diag(torch.ones(tokens.shape[-1] - 1), -1)


def get_duplicate_token_head_detection_pattern(tokens: Tensor) -> Tensor:
    """Ones on earlier occurrences of the same token."""
    row = tokens.reshape(-1)
    return torch.tril((row[:, None] == row).float(), -1)


def get_induction_head_detection_pattern(tokens: Tensor) -> Tensor:
    """Ones on the tokens after earlier occurrences of the same token."""
    shifted = get_duplicate_token_head_detection_pattern(tokens).roll(1, 1)
    shifted[:, 0] = 0
    return torch.tril(shifted)


_PATTERNS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous_token_head": get_previous_token_head_detection_pattern,
    "duplicate_token_head": get_duplicate_token_head_detection_pattern,
    "induction_head": get_induction_head_detection_pattern,
}


def get_supported_heads() -> None:
    """Print the names of patterns."""
    print(f"Supported heads: {HEAD_NAMES}")


def compute_head_attention_similarity_score(
    attention_pattern: Tensor, detection_pattern: Tensor, *, exclude_bos: bool, exclude_current_token: bool,
    error_measure: str,
) -> float:  # fmt: skip
    """How close an attention pattern comes to another; neither is changed."""
    assert is_square(attention_pattern), f"Attention pattern is not square; got shape {attention_pattern.shape}"
    is_mul = error_measure == "mul"
    weighed = attention_pattern.clone() if is_mul else (attention_pattern - detection_pattern).abs()
    assert is_mul or is_lower_triangular(weighed), "the patterns differ above the diagonal"
    if exclude_bos:
        weighed[:, 0] = 0
    if exclude_current_token:
        weighed.fill_diagonal_(0)
    if is_mul:
        return float((weighed * detection_pattern).sum() / weighed.sum())
    return 1 - round(float(weighed.mean() * len(weighed)), 3)
