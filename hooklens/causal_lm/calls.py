"""What a call of the model takes: inputs brought to one form, keywords checked before anything runs."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooklens.errors import InputError, suggest_names
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.positions import LogitsAt, TokenPlan

Input = str | Sequence[str] | Int[Tensor, "batch pos"] | Int[Tensor, " pos"] | Float[Tensor, "batch pos d_model"]
ReturnType = Literal["logits", "loss", "both"] | None


class LogitsAndLoss(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch pos d_vocab"]
    loss: Tensor


class PreparedCall(NamedTuple):
    """A call whose input is known to fit the model."""

    input: Tensor
    plan: TokenPlan
    past_kv_cache: HookedKeyValueCache | None
    start_at_layer: int | None


class CallKeywords:
    """The keywords of a call, told apart: those that shape the input and those that shape the output.

    Args:
        prepare: the method that takes the first kind, keyword-only.
        run: the method that takes the second kind, keyword-only.
    """

    def __init__(self, prepare: Callable[..., Any], run: Callable[..., Any]) -> None:
        self._prepare = _keyword_only(prepare)
        self._run = _keyword_only(run)

    def split(self, keywords: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keywords for preparing and for running.

        Raises:
            TypeError: a keyword that a call does not take.
        """
        known = self._prepare | self._run
        unknown = sorted(keywords.keys() - known)
        if unknown:
            raise TypeError(
                f"unexpected keyword {unknown[0]!r}.{suggest_names(unknown[0], known)} "
                f"A call takes {', '.join(sorted(known))}"
            )
        prepare = {name: value for name, value in keywords.items() if name in self._prepare}
        return prepare, {name: value for name, value in keywords.items() if name in self._run}


def _keyword_only(method: Callable[..., Any]) -> frozenset[str]:
    parameters = inspect.signature(method).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)


def check_return_type(
    return_type: ReturnType,
    loss_per_token: bool,  # noqa: FBT001
    start_at_layer: int | None,
    stop_at_layer: int | None,
    logits_at: LogitsAt,
) -> None:
    """Refuse outputs that a call cannot give.

    Raises:
        InputError: an unknown return type, or arguments that exclude each other.
    """
    if return_type not in ("logits", "loss", "both", None):
        raise InputError(f"return_type is {return_type!r}; expected 'logits', 'loss', 'both' or None")
    if return_type in ("loss", "both"):
        clash = {"start_at_layer": start_at_layer, "stop_at_layer": stop_at_layer, "logits_at": logits_at}
        given = [name for name, value in clash.items() if value is not None]
        if given:
            raise InputError(
                f"return_type={return_type!r} needs token ids and logits at every position; leave out {given}"
            )
    elif loss_per_token:
        raise InputError(f"loss_per_token needs return_type 'loss' or 'both', got {return_type!r}")
    if stop_at_layer is not None and logits_at is not None:
        raise InputError("stop_at_layer returns the residual stream: logits_at has nothing to select")


def check_stream(stream: object, d_model: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Check the residual stream that a call starts from.

    Raises:
        InputError: another shape, dtype or device than the model's stream.
    """
    if not isinstance(stream, Tensor) or stream.ndim != 3 or stream.shape[-1] != d_model:
        found = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        raise InputError(f"with start_at_layer the input is the residual stream [batch, pos, {d_model}]; got {found}")
    if (stream.dtype, stream.device) != (dtype, device):
        raise InputError(
            f"the residual stream is {stream.dtype} on {stream.device}, the model {dtype} on {device}; convert it"
        )
    return stream
