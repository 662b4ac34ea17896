"""Transports: maps that carry the stream at the entrance of a layer to the end of the model before it is read."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from hooklens.analysis.lens.origin import Origin
from hooklens.analysis.reading.connection import read_model
from hooklens.arguments import reads, require
from hooklens.causal_lm import HookedCausalLM
from hooklens.errors import HookLensError, InputError
from hooklens.hooks.values import TensorValue

Own = TypeVar("Own", bound="Transport")


@dataclass(frozen=True, kw_only=True)
class Transport(TensorValue, ABC):
    """A map for each layer from its stream to what the last stream may be expected to be.

    A transport of one's own is a frozen dataclass that defines `apply`; `logit_lens(transport=)` takes it.

    Attributes:
        layers: the layers whose entering streams it carries, ascending.
        origin: the model that it was fitted on.
    """

    layers: tuple[int, ...]
    origin: Origin

    @abstractmethod
    def apply(self, stream: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_model"]:
        """The stream at the entrance of a layer, carried to the end, in the precision of sums.

        Args:
            stream: `resid_pre` of the layer.
            layer: one of `layers`.
        """

    def check(self, model: HookedCausalLM) -> None:
        """Refuse a model that it was not fitted on.

        Raises:
            TransformError: the model's weights were processed otherwise.
            InputError: the model is another, by its configuration or its weights.
        """
        name = type(self).__name__
        self.origin.check(model, what=f"this {name}", remedy="say that you mean it: transport.assume(model)")

    @reads(model=read_model)
    def assume(self: Own, model: HookedCausalLM) -> Own:
        """The same transport, said to hold for another model: a base model's lens on its fine-tune, say.

        Belrose et al. 2023 find that tuned lenses transfer to fine-tuned models.

        Raises:
            InputError: the model has another width or other layers.
        """
        width, n_layers = self.d_model, model.cfg.n_layers
        if width != model.cfg.d_model or self.layers[-1] >= n_layers:
            raise InputError(
                f"this {type(self).__name__} carries streams of width {width} from layers up to {self.layers[-1]}; the "
                f"model has d_model={model.cfg.d_model} and n_layers={n_layers}"
            )
        return replace(self, origin=Origin.of(model))

    @property
    @abstractmethod
    def d_model(self) -> int:
        """The width of the streams."""

    def place_of(self, layer: int) -> int:
        """Where a layer stands among `layers`.

        Raises:
            InputError: it is none of them.
        """
        if layer not in self.layers:
            raise InputError(
                f"layer={layer}: this {type(self).__name__} carries the streams that enter layers {list(self.layers)}"
            )
        return self.layers.index(layer)


def carry(transport: Transport, stream: Float[Tensor, "*axes d_model"], layer: int) -> Float[Tensor, "*axes d_model"]:
    """What a transport makes of a stream.

    Raises:
        InputError: no stream of the same shape.
    """
    carried: object = transport.apply(stream, layer)
    if not isinstance(carried, Tensor) or carried.shape != stream.shape:
        found = list(carried.shape) if isinstance(carried, Tensor) else type(carried).__name__
        raise InputError(
            f"{type(transport).__name__}.apply gave {found} for the stream of layer {layer}; expected a tensor "
            f"{list(stream.shape)}"
        )
    return carried


def read_transport(given: object, *, what: str, error: type[HookLensError] = InputError) -> Transport:
    """A transport.

    Raises:
        HookLensError: anything else.
    """
    transport: Transport = require(
        given, kind=Transport, what=what, expected="a TunedLens, a JacobianLens, or another Transport", error=error
    )
    return transport


def apply_affine(
    stream: Float[Tensor, "*axes d_model"], weight: Float[Tensor, "out into"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*axes d_model"]:
    """`x W^T + b` where the stream lies, in the wider of the two precisions."""
    dtype = torch.promote_types(stream.dtype, weight.dtype)
    moved = weight.to(stream.device, dtype)
    return torch.nn.functional.linear(stream.to(dtype), moved, None if bias is None else bias.to(moved))
