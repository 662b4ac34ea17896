"""What a call of the model takes: inputs brought to one form, keywords checked before anything runs."""

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypedDict, overload

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import (
    Reader,
    optional,
    read_flag,
    read_int,
    read_numbers,
    read_one_of,
    read_tensor,
    refusal,
    require,
)
from hooklens.arguments.foreign import explain_keyword
from hooklens.errors import HookLensError, InputError, suggest_names
from hooklens.kv_cache import HookedKeyValueCache
from hooklens.model.plan.documents import Borders, read_document_borders, read_document_ids
from hooklens.model.plan.positions import LogitsAt, TokenPlan
from hooklens.tokens import PaddingSide, Prompt, is_integer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from hooklens.hooks.arguments import CaptureKeywords, HookKeywords

Input = Prompt | Float[Tensor, "batch pos d_model"]
ReturnType = Literal["logits", "loss", "both"] | None


class InputKeywords(TypedDict, total=False):
    """Keywords of a call that say how its input is read; `prefill` takes these."""

    prepend_bos: bool | None
    padding_side: PaddingSide | None
    attention_mask: Tensor | None
    positions: Tensor | None
    document_ids: Tensor | None
    document_borders: Borders
    restart_positions: bool | None


class LogitsAndLoss(NamedTuple):
    """What `return_type="both"` gives."""

    logits: Float[Tensor, "batch pos d_vocab_out"]
    loss: Tensor


Output = Tensor | LogitsAndLoss | None
"""What a call gives, by its `return_type`."""


if TYPE_CHECKING:

    class CallOptions(InputKeywords, total=False):
        """Keywords of a call but for those that its type depends on, `return_type` and `stop_at_layer`."""

        loss_per_token: bool
        past_kv_cache: HookedKeyValueCache | None
        start_at_layer: int | None
        logits_at: LogitsAt

    class HookedCallOptions(CallOptions, HookKeywords, total=False):
        """What `run_with_hooks` takes besides what its type depends on."""

    class CachedCallOptions(HookedCallOptions, CaptureKeywords, total=False):
        """What `run_with_cache` takes besides what its type depends on."""

        remove_batch_dim: bool
        check_memory: bool

    class Called(Protocol):
        """The type of a model's call."""

        @overload
        def __call__(
            self,
            input: Input,
            *,
            return_type: Literal["logits", "loss"] = ...,
            stop_at_layer: int | None = ...,
            **options: Unpack[CallOptions],
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            input: Input,
            *,
            return_type: Literal["both"],
            stop_at_layer: None = ...,
            **options: Unpack[CallOptions],
        ) -> LogitsAndLoss: ...
        @overload
        def __call__(
            self,
            input: Input,
            *,
            return_type: None,
            stop_at_layer: None = ...,
            **options: Unpack[CallOptions],
        ) -> None: ...
        @overload
        def __call__(
            self,
            input: Input,
            *,
            return_type: None,
            stop_at_layer: int,
            **options: Unpack[CallOptions],
        ) -> Tensor: ...
        @overload
        def __call__(
            self,
            input: Input,
            *,
            return_type: ReturnType,
            stop_at_layer: int | None = ...,
            **options: Unpack[CallOptions],
        ) -> Output: ...


class PreparedCall(NamedTuple):
    """A call whose input is known to fit the model."""

    input: Tensor
    plan: TokenPlan
    past_kv_cache: HookedKeyValueCache | None
    start_at_layer: int | None


def read_mask(given: object, *, what: str, error: type[HookLensError] = InputError) -> Tensor:
    """A mask as a tensor; its shape and values are checked against the input.

    Raises:
        HookLensError: neither a tensor nor a list or array of numbers.
    """
    return read_numbers(given, what=what, expected="a tensor [batch pos] of 1 (token) and 0 (padding)", error=error)


def read_positions(given: object, *, what: str, error: type[HookLensError] = InputError) -> Tensor:
    """Positions as int64, where they are whole numbers; their shape and values are checked against the input.

    Raises:
        HookLensError: no tensor, or one of other numbers.
    """
    positions = read_tensor(given, what=what, expected="a tensor [pos] or [batch pos] of whole numbers", error=error)
    if not is_integer(positions):
        raise refusal(given, what, "a tensor [pos] or [batch pos] of whole numbers", error)
    return positions.long()


PREPARING: dict[str, Reader] = {
    "prepend_bos": optional(read_flag),
    "padding_side": partial(read_one_of, options=("left", "right", None)),
    "attention_mask": optional(read_mask),
    "positions": optional(read_positions),
    "document_ids": optional(read_document_ids),
    "document_borders": optional(read_document_borders),
    "restart_positions": optional(read_flag),
    "past_kv_cache": optional(
        partial(require, kind=HookedKeyValueCache, expected="a HookedKeyValueCache, from model.prefill(prefix)")
    ),
    "start_at_layer": optional(read_int),
}
"""Readers of what shapes the input of a call."""

CALLING: dict[str, Reader] = {
    **PREPARING,
    "return_type": partial(read_one_of, options=("logits", "loss", "both", None)),
    "loss_per_token": read_flag,
    "stop_at_layer": optional(read_int),
}
"""Readers of a call's keywords; `logits_at` is read where the number of tokens is known."""


class CallKeywords:
    """The keywords of a call, which methods take as `**keywords` and hand on.

    Args:
        forward: takes them all, keyword-only.
        prepare: takes those that shape the input, keyword-only.
    """

    def __init__(self, forward: Callable[..., Any], prepare: Callable[..., Any]) -> None:
        parameters = inspect.signature(forward).parameters.values()
        self._parameters = {one.name: one for one in parameters if one.kind is one.KEYWORD_ONLY}
        # Read from the code: `inspect.signature` takes a hundred calls, and this is done on import.
        code = inspect.unwrap(prepare).__code__
        self._prepare = frozenset(code.co_varnames[code.co_argcount : code.co_argcount + code.co_kwonlyargcount])

    def split(
        self, keywords: Mapping[str, object], method: Callable[..., Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The keywords for preparing and for running.

        Args:
            keywords: as they were given.
            method: what they were given to.

        Raises:
            TypeError: a keyword that a call does not take.
        """
        unknown = sorted(keywords.keys() - self._parameters)
        if unknown:
            hint = explain_keyword(unknown[0], inspect.signature(method).parameters)
            hint = hint or suggest_names(unknown[0], self._parameters)
            raise TypeError(
                f"unexpected keyword {unknown[0]!r}.{hint} A call takes {', '.join(sorted(self._parameters))}"
            )
        prepare = {name: value for name, value in keywords.items() if name in self._prepare}
        return prepare, {name: value for name, value in keywords.items() if name not in self._prepare}

    def show(self, method: Callable[..., Any], *, names: Collection[str] | None = None) -> None:
        """Let the signature of a method name the keywords that it hands on, for `help` and notebooks.

        Args:
            method: takes `**keywords`.
            names: those that it takes; None: all.
        """
        signature = inspect.signature(method)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        handed_on = [one for name, one in self._parameters.items() if names is None or name in names]
        method.__signature__ = signature.replace(parameters=[*own, *handed_on])  # type: ignore[attr-defined]


def check_return_type(
    return_type: ReturnType,
    loss_per_token: bool,  # noqa: FBT001
    start_at_layer: int | None,
    stop_at_layer: int | None,
    logits_at: LogitsAt,
) -> None:
    """Refuse outputs that a call cannot give.

    Raises:
        InputError: arguments that exclude each other.
    """
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


def check_stream(stream: object, d_model: int, dtype: torch.dtype, devices: Collection[torch.device]) -> Tensor:
    """Check the residual stream that a call starts from.

    Raises:
        InputError: another shape, dtype or device than the model's stream.
    """
    if not isinstance(stream, Tensor) or stream.ndim != 3 or stream.shape[-1] != d_model:
        found = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
        raise InputError(f"with start_at_layer the input is the residual stream [batch, pos, {d_model}]; got {found}")
    if not stream.numel() or stream.layout != torch.strided:
        found = f"shape {list(stream.shape)}" if not stream.numel() else f"layout {stream.layout}"
        raise InputError(f"the residual stream has {found}; expected at least one row and position, laid out plainly")
    if stream.dtype != dtype or stream.device not in devices:
        places = " and ".join(map(str, devices))
        raise InputError(
            f"the residual stream is {stream.dtype} on {stream.device}, the model {dtype} on {places}; convert it"
        )
    return stream
