"""Batches of tokens in the forms they come in, and the loss of the next token on them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens import tokens as tokenization
from hooklens.arguments import show
from hooklens.causal_lm import HookedCausalLM
from hooklens.documents import NO_DOCUMENT
from hooklens.errors import InputError, suggest_names
from hooklens.model.loss import next_token_loss

IGNORED = -100
"""The label of a token that does not count, as in transformers."""

Loss = Callable[[Any, Any], Tensor]
"""`loss(model, batch)`: a scalar to be made small. Tensors of the batch lie on the model's device."""

_KEYS = ("input_ids", "attention_mask", "labels", "document_ids")
# The fields of `hooklens.documents.PackedRows`.
_FIELD_NAMES = {"ids": "input_ids"}
_FORMS = (
    "token ids [batch, pos], a mapping with 'input_ids' and any of 'attention_mask', 'labels' (-100: does not count) "
    "and 'document_ids', a PackedRows, or a tuple of token ids alone"
)


class TokenBatch(NamedTuple):
    """A batch of token ids.

    Attributes:
        input_ids: `[batch pos]`.
        attention_mask: 1 for tokens, 0 for padding; None: as the model's call reads ids without a mask.
        labels: the tokens to predict, each at its own place and predicted from the place before it; -100 does not
            count. None: the input's.
        document_ids: as a call of the model takes them.
    """

    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Tensor | None = None
    labels: Int[Tensor, "batch pos"] | None = None
    document_ids: Tensor | None = None


class NextTokenObjective:
    """The model's own loss: the mean cross-entropy of the next token in nats, over the tokens that are predicted."""

    def read(self, batch: Any, device: torch.device) -> TokenBatch:
        """The batch in one form, checked."""
        checked = read_token_batch(batch)
        return checked._replace(**{name: move(one, device) for name, one in checked._asdict().items()})

    def weigh(self, model: nn.Module, batch: TokenBatch) -> int:
        """The number of tokens that are predicted."""
        assert isinstance(model, HookedCausalLM)
        return count_predicted(model, batch)

    def measure(self, model: nn.Module, batch: TokenBatch) -> Tensor:
        """The loss of the batch."""
        assert isinstance(model, HookedCausalLM)
        if batch.labels is not None:
            of_labels = label_loss(model, batch)
            return of_labels.total / of_labels.n_counted
        loss: Tensor = model(
            batch.input_ids,
            return_type="loss",
            attention_mask=batch.attention_mask,
            document_ids=batch.document_ids,
        )
        return loss


class FunctionObjective:
    """A loss of somebody's own.

    Args:
        function: `loss(model, batch)`.
    """

    def __init__(self, function: Loss) -> None:
        self._function = function

    def read(self, batch: Any, device: torch.device) -> Any:
        """The batch as it came, its tensors on the device."""
        return move(batch, device)

    def weigh(self, model: nn.Module, batch: Any) -> int:
        """One: batches count alike."""
        return 1

    def measure(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss of the batch."""
        loss: object = self._function(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise InputError(f"loss(model, batch) gave {show(loss)}, expected one number, a tensor of a floating dtype")
        return loss.reshape(())


Objective = NextTokenObjective | FunctionObjective
"""What training makes small: reads batches, weighs them beside each other, and measures their mean loss."""


def read_token_batch(batch: object) -> TokenBatch:
    """A batch of token ids, from any of its forms.

    Raises:
        InputError: another form, unknown keys, or tensors that do not fit each other; all that is wrong.
    """
    names: tuple[str, ...] | None = getattr(batch, "_fields", None)
    if isinstance(batch, Tensor):
        given: dict[str, Any] = {"input_ids": batch}
    elif isinstance(batch, Mapping):
        given = dict(batch)
    elif isinstance(batch, tuple) and names is not None:
        given = {_FIELD_NAMES.get(name, name): value for name, value in zip(names, batch, strict=True)}
    elif isinstance(batch, list | tuple) and len(batch) == 1:
        given = {"input_ids": batch[0]}
    else:
        several = f" of {len(batch)}" if isinstance(batch, list | tuple) else ""
        raise InputError(
            f"a batch is {type(batch).__name__}{several}; expected {_FORMS}. What else batches hold is for a loss of "
            "your own, loss(model, batch)"
        )
    unknown = [name for name in given if name not in _KEYS]
    problems = [f"unknown key {name!r}.{suggest_names(str(name), _KEYS)}" for name in unknown]
    problems += [] if "input_ids" in given else ["no 'input_ids'"]
    known = {name: given[name] for name in _KEYS if given.get(name) is not None}
    problems += [problem for name, value in known.items() for problem in _find_problems(name, value, known)]
    if problems:
        raise InputError(f"a batch: {'; '.join(problems)}. Expected {_FORMS}")
    return TokenBatch(**known)


def _find_problems(name: str, value: object, batch: Mapping[str, object]) -> list[str]:
    if not isinstance(value, Tensor):
        return [f"{name!r} is {show(value)}, expected a tensor [batch, pos]"]
    may_be_flags = name == "attention_mask" and value.dtype == torch.bool
    is_whole = may_be_flags or not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    if not is_whole or value.ndim != 2:
        return [f"{name!r} is {show(value)}, expected whole numbers [batch, pos]"]
    ids = batch.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2 and value.shape != ids.shape:
        return [f"{name!r} is {list(value.shape)}, 'input_ids' {list(ids.shape)}"]
    return []


def move(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device, in the form it came in."""
    if isinstance(batch, Tensor):
        moved = batch.to(device, non_blocking=True)
        # Backward cannot keep what was made under inference_mode.
        return moved.clone() if moved.is_inference() else moved
    if isinstance(batch, Mapping):
        return {name: move(one, device) for name, one in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(one, device) for one in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(move(one, device) for one in batch)
    return batch


def count_predicted(model: HookedCausalLM, batch: TokenBatch) -> int:
    """The number of tokens that count in the loss of a batch."""
    return int(_counts(model, batch).sum())


class LabelLoss(NamedTuple):
    """The loss of a batch with labels.

    Attributes:
        logits: at every position.
        total: the sum of the losses of the labels that count, in nats.
        n_counted: how many these are.
    """

    logits: Float[Tensor, "batch pos d_vocab"]
    total: Float[Tensor, ""]
    n_counted: Int[Tensor, ""]


def label_loss(model: HookedCausalLM, batch: TokenBatch) -> LabelLoss:
    """Run the model on a batch with labels.

    A label of padding, or of the first token of a row or document, does not count: nothing predicts it.

    Raises:
        InputError: no label counts, or some are no tokens.
    """
    assert batch.labels is not None
    counts = _counts(model, batch)
    labels = torch.where(counts, batch.labels.long(), 0)
    logits: Tensor = model(batch.input_ids, attention_mask=batch.attention_mask, document_ids=batch.document_ids)
    n_tokens = logits.shape[-1]
    wrong = (labels < 0) | (labels >= n_tokens)
    if bool(wrong.any()):
        raise InputError(f"labels: {labels[wrong][:10].tolist()} are no tokens; expected 0 to {n_tokens - 1}, or -100")
    if not bool(counts.any()):
        raise InputError(
            "labels: none counts in a batch: all are -100, of padding, or of the first tokens of rows or documents"
        )
    losses = next_token_loss(logits, labels, _real(model, batch), per_token=True)
    return LabelLoss(logits, (losses * counts[:, 1:]).sum(), counts.sum())


def _real(model: HookedCausalLM, batch: TokenBatch) -> Tensor | None:
    """Which columns are tokens, as a call of the model reads it."""
    if batch.document_ids is not None and batch.attention_mask is None:
        return batch.document_ids != NO_DOCUMENT
    mask = tokenization.read_tokens(
        batch.input_ids, model.tokenizer, d_vocab=model.cfg.d_vocab, attention_mask=batch.attention_mask
    ).attention_mask
    real = None if mask is None else mask.bool().to(batch.input_ids.device)
    if real is not None and batch.document_ids is not None:
        real = real & (batch.document_ids != NO_DOCUMENT)
    return real


def _counts(model: HookedCausalLM, batch: TokenBatch) -> Tensor:
    """Which tokens are predicted, and count: `[batch pos]` booleans."""
    ids = batch.input_ids
    real = _real(model, batch)
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
    has_token_before = (real.long().cumsum(1) - real.long()) > 0
    counts = real & has_token_before
    if batch.document_ids is not None:
        marks = model.read_documents(ids, batch.document_ids)
        plan = model.make_plan(ids, batch.attention_mask, marks=marks)
        assert plan.starts_document is not None
        counts = counts & ~plan.starts_document
    return counts if batch.labels is None else counts & (batch.labels != IGNORED)
