"""The loss of a language model."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooklens.errors import InputError
from hooklens.precision import widen

_PREDICTS_NOTHING = -100


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Bool[Tensor, "batch pos"] | None = None,
    *,
    last_logits: Float[Tensor, "rows d_vocab"] | None = None,
    starts_document: Bool[Tensor, "rows pos"] | None = None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch predicted"]:
    """Cross-entropy in nats of each next token, averaged over the tokens that are predicted.

    Args:
        logits: at every position.
        tokens: the tokens run.
        attention_mask: real tokens; padding is neither predicted nor predicts, wherever it stands.
        last_logits: the logits before the first token, of a cached prefix: they predict it.
        starts_document: the first tokens of documents that share a row; nothing predicts them.
        per_token: the losses themselves, `[batch pos-1]` (`[batch pos]` with `last_logits`), 0 for padding and for
            the first token of a row or document.

    Raises:
        InputError: there is no token to predict.
    """
    # Where the logits came out, which on several devices is not where tokens went in.
    device = logits.device
    tokens = tokens.to(device)
    attention_mask = None if attention_mask is None else attention_mask.to(device)
    starts_document = None if starts_document is None else starts_document.to(device)
    if attention_mask is None:
        predictions, targets, counted = logits, tokens[:, 1:], None
        if last_logits is not None:
            first = last_logits.to(logits)[:, None].expand(len(tokens), 1, -1)
            predictions, targets = torch.cat([first, logits[:, :-1]], 1), tokens
    else:
        predictions, counted = _predict_from_real(logits, attention_mask.bool(), last_logits)
        targets = tokens if last_logits is not None else tokens[:, 1:]
    if starts_document is not None:
        goes_on = ~starts_document[:, -targets.shape[1] :].expand(len(targets), -1)
        counted = goes_on if counted is None else counted & goes_on
    if not targets.shape[1] or (counted is not None and not torch.compiler.is_compiling() and not counted.any()):
        subject = "rows" if starts_document is None else "rows and documents"
        raise InputError(
            f"loss: {subject} of one token have no next token to predict; give at least two, or continue a cached "
            "prefix (model.prefill)"
        )
    if counted is not None:
        targets = targets.masked_fill(~counted, _PREDICTS_NOTHING)
    # Predictions at further columns predict nothing. Cutting them off would copy all others, here and in backward.
    padded = F.pad(targets, (0, predictions.shape[1] - targets.shape[1]), value=_PREDICTS_NOTHING)
    flat = widen(predictions).flatten(0, 1), padded.flatten()
    if not per_token:
        return F.cross_entropy(*flat, ignore_index=_PREDICTS_NOTHING)
    losses = F.cross_entropy(*flat, reduction="none", ignore_index=_PREDICTS_NOTHING)
    return losses.view(padded.shape)[:, : targets.shape[1]].contiguous()


def _predict_from_real(
    logits: Float[Tensor, "batch pos d_vocab"],
    mask: Bool[Tensor, "batch pos"],
    last_logits: Float[Tensor, "rows d_vocab"] | None,
) -> tuple[Float[Tensor, "batch predicted d_vocab"], Bool[Tensor, "batch predicted"]]:
    """The logits at the real token before each token, and which tokens are predicted so."""
    column = torch.arange(mask.shape[1], device=mask.device)
    latest = torch.where(mask, column, -1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    if last_logits is None:
        before, mask = before[:, 1:], mask[:, 1:]
        predictions = logits.take_along_dim(before.clamp(min=0)[..., None], 1)
        return predictions, mask & (before >= 0)
    first = last_logits.to(logits)[:, None].expand(len(mask), 1, -1)
    return torch.cat([first, logits], 1).take_along_dim((before + 1)[..., None], 1), mask
