"""Token ids that come from outside: what a network can run, and what a tokenizer can decode."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooklens.errors import InputError
from hooklens.tokens.tokenizer import Tokenizer

_SHOWN = 10


def check_token_ids(tokens: Tensor, d_vocab: int) -> None:
    """Check that a tensor can be run as token ids `[pos]` or `[batch pos]`.

    Values are looked at where the tensor lies, so check before moving it to an accelerator. Where there are none to
    look at (under `torch.compile`, on the device "meta") form alone is checked.

    Raises:
        InputError: not an integer dtype, no or more than two axes, empty, or ids outside `[0, d_vocab)`.
    """
    # A plain Tensor annotation: any other shape or dtype is for this function to refuse, in its own words.
    check_form(tokens)
    if has_values(tokens):
        check_range(tokens, d_vocab)


def check_form(tokens: Tensor) -> None:
    """Check dtype and shape of token ids.

    Raises:
        InputError: not an integer dtype, no or more than two axes, or empty.
    """
    if not is_integer(tokens):
        stream = " (a residual stream goes in with start_at_layer=)" if tokens.is_floating_point() else ""
        raise InputError(f"token ids have dtype {tokens.dtype}; expected an integer dtype such as torch.int64{stream}")
    if tokens.ndim not in (1, 2):
        raise InputError(f"token ids have shape {list(tokens.shape)}; expected [pos] or [batch pos]")
    if tokens.numel() == 0:
        raise InputError(f"token ids are empty (shape {list(tokens.shape)}, an empty prompt); give at least one token")


def check_has_values(tokens: Tensor, device: torch.device) -> None:
    """Check that ids can be brought to a model's device.

    Raises:
        InputError: they lie on "meta", and the model does not.
    """
    if tokens.is_meta and device.type != "meta":
        raise InputError(f"token ids lie on the device 'meta', where tensors have no values; the model is on {device}")


def as_usable(tokens: Tensor) -> Tensor:
    """Ids that can be saved for a backward pass, which those made under `torch.inference_mode` cannot be outside."""
    if torch.compiler.is_compiling() or not tokens.is_inference() or torch.is_inference_mode_enabled():
        return tokens
    return tokens.clone()


def check_range(tokens: Tensor, d_vocab: int) -> None:
    """Check the values of token ids of any shape.

    Raises:
        InputError: ids outside `[0, d_vocab)`.
    """
    # One transfer for both ends, where the ids lie on an accelerator.
    smallest, largest = torch.stack(torch.aminmax(tokens)).tolist() if tokens.numel() else (0, 0)
    if smallest >= 0 and largest < d_vocab:
        return
    rows = tokens if tokens.ndim == 2 else tokens.reshape(1, -1)
    offenders = ((rows < 0) | (rows >= d_vocab)).nonzero().tolist()
    shown = ", ".join(f"{int(rows[row, pos])} (row {row}, position {pos})" for row, pos in offenders[:_SHOWN])
    more = f" and {len(offenders) - _SHOWN} more" if len(offenders) > _SHOWN else ""
    raise InputError(
        f"token ids outside the vocabulary: {shown}{more}; this model has d_vocab={d_vocab}, ids 0 to {d_vocab - 1}. "
        "Was the text encoded with another model's tokenizer?"
    )


def has_values(tokens: Tensor) -> bool:
    """Whether a tensor's values can be looked at: not while it is traced, nor on the device "meta"."""
    return not (torch.compiler.is_compiling() or tokens.is_meta)


def is_integer(tokens: Tensor) -> bool:
    """Whether a tensor's dtype is one of integers; booleans are none."""
    return not (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool)


def is_token_id(given: object) -> bool:
    """Whether something is a single integer: an int, a numpy integer, or a tensor or array of one without axes."""
    if isinstance(given, Tensor):
        return given.ndim == 0 and is_integer(given) and not given.is_meta
    if isinstance(given, np.ndarray):
        return given.ndim == 0 and given.dtype.kind in "iu"
    return isinstance(given, int | np.integer) and not isinstance(given, bool)


def read_token_id(given: Any, *, what: str) -> int:
    """One token id as an int.

    Raises:
        InputError: it is no integer.
    """
    if not is_token_id(given):
        raise InputError(f"{what} is {given!r} ({type(given).__name__}); expected a token id, an integer")
    return int(given)


def knows_id(tokenizer: Tokenizer, token: int) -> bool:
    """Whether a tokenizer has a token with an id; ids of added tokens may leave gaps."""
    if 0 <= token < len(tokenizer):
        return True
    convert = getattr(tokenizer, "convert_ids_to_tokens", None)
    if convert is None or token < 0:
        return False
    try:
        return isinstance(convert(token), str)
    # What tokenizers in Python (the first two) and in Rust do about ids they do not have.
    except (IndexError, KeyError, OverflowError):
        return False


def check_known_ids(tokenizer: Tokenizer, rows: Iterable[Sequence[int]]) -> None:
    """Check that a tokenizer can decode ids.

    Raises:
        InputError: ids that it does not have.
    """
    unknown = [token for token in sorted({token for row in rows for token in row}) if not knows_id(tokenizer, token)]
    if not unknown:
        return
    more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
    subject = f"token id {unknown[0]} is" if len(unknown) == 1 else f"token ids {unknown[:_SHOWN]}{more} are"
    raise InputError(f"{subject} not in the tokenizer's vocabulary; its ids are 0 to {len(tokenizer) - 1}")
