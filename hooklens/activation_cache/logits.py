"""Direct logit attribution: a logit as a sum over the components of the last stream.

    logit[t] = sum over components c of <norm(c), W_U[:, t]>  +  <b_norm, W_U[:, t]> + b_U[t]

times `cfg.logits_scale`,

with the final norm's denominator held at the value it had in the run (Elhage et al. 2021; nostalgebraist
2020 for reading streams through the unembedding). The terms after the sum belong to no component. Where the
logits have a soft cap the sum is the logit before it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.activation_cache.captured import CapturedActivations
from hooklens.activation_cache.readout import like
from hooklens.activation_cache.stream import require_weight
from hooklens.errors import CacheError

TokenIds = int | Int[Tensor, "..."]


@dataclass(frozen=True, kw_only=True)
class LogitDirections:
    """What is asked of the logits: that of a token, or its difference to another's.

    Attributes:
        ids: the tokens, one number, `[batch]`, `[pos]` or `[batch pos]`.
        directions: the columns of `W_U` (behind a projection: through it), or differences of columns; times
            `cfg.logits_scale`.
        bias: of the same tokens: what the final norm's bias and `b_U` add to the logit.
    """

    ids: Int[Tensor, "*ids"]
    directions: Float[Tensor, "*ids d_model"]
    bias: Float[Tensor, "*ids"]


def find_directions(
    cache: CapturedActivations,
    tokens: TokenIds | str,
    incorrect_tokens: TokenIds | str | None,
    *,
    like_activation: Tensor,
) -> LogitDirections:
    """The directions of tokens, or of their difference to other tokens of the same shape.

    Raises:
        CacheError: text, ids outside the vocabulary, or two shapes that differ.
    """
    ids = _check_ids(cache, tokens, "tokens")
    directions, bias = _directions_of(cache, ids, like_activation)
    if incorrect_tokens is not None:
        wrong_ids = _check_ids(cache, incorrect_tokens, "incorrect_tokens")
        if wrong_ids.shape != ids.shape:
            raise CacheError(
                f"tokens have shape {list(ids.shape)} and incorrect_tokens {list(wrong_ids.shape)}; expected one "
                "incorrect token for each token"
            )
        wrong_directions, wrong_bias = _directions_of(cache, wrong_ids, like_activation)
        directions, bias = directions - wrong_directions, bias - wrong_bias
    return LogitDirections(ids=ids, directions=directions, bias=bias)


def _check_ids(cache: CapturedActivations, tokens: TokenIds | str, what: str) -> Tensor:
    if isinstance(tokens, str):
        raise CacheError(
            f"{what} is the text {tokens!r}, and a cache has no tokenizer; give token ids: "
            f"model.to_single_token({tokens!r})"
        )
    d_vocab = cache.cfg.d_vocab_out
    try:
        ids = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        ids = torch.empty(0, dtype=torch.bool)
    whole = not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)
    if not whole or (ids.numel() and not bool(((ids >= 0) & (ids < d_vocab)).all())):
        found = tokens.tolist() if isinstance(tokens, Tensor) else tokens
        raise CacheError(f"{what} holds {found!r}; expected token ids from 0 to {d_vocab - 1}")
    return ids


def _directions_of(cache: CapturedActivations, ids: Tensor, activation: Tensor) -> tuple[Tensor, Tensor]:
    W_U = require_weight(cache, "unembed.W_U")
    directions = like(W_U.T[ids.to(W_U.device)], activation)
    if cache.cfg.d_embed is not None:
        directions = directions @ like(require_weight(cache, "unembed.W_proj_out"), activation).T
    bias = torch.zeros_like(directions[..., 0])
    if cache.cfg.unembed_bias:
        bias = bias + like(require_weight(cache, "unembed.b_U")[ids.to(W_U.device)], activation)
    if cache.cfg.final_norm is not None and cache.cfg.final_norm.bias:
        bias = bias + directions @ like(require_weight(cache, "ln_final.b"), activation)
    scale = cache.cfg.logits_scale
    return (directions, bias) if scale == 1 else (directions * scale, bias * scale)


def align_directions(directions: Float[Tensor, "*ids d_model"], lead: torch.Size) -> Float[Tensor, "*aligned d_model"]:
    """Directions of tokens with axes that broadcast with the `lead` axes (batch and pos) of an activation.

    One axis of ids is that of the rows where there are both rows and positions.

    Raises:
        CacheError: the tokens do not fit the axes.
    """
    ids_shape = directions.shape[:-1]
    if len(ids_shape) == 1 and len(lead) == 2:
        directions = directions[:, None]
    aligned = directions.shape[:-1]
    fits = len(aligned) <= len(lead) and all(
        size in (1, wanted) for size, wanted in zip(aligned[::-1], lead[::-1], strict=False)
    )
    if not fits:
        raise CacheError(
            f"tokens have shape {list(ids_shape)}, the activations' batch and pos axes {list(lead)}; expected one "
            "token, one per row, or one per row and position"
        )
    return directions
