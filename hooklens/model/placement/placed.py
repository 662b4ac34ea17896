"""A network whose parts may lie on several devices."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from hooklens.arguments import optional, reads, refusal, require
from hooklens.config import HookedConfig
from hooklens.errors import HookLensError, InputError
from hooklens.model.placement.placement import Placement, find_placement, list_parts, read_device_map
from hooklens.model.placement.shared_weights import refuse_shared
from hooklens.optional import import_package

if TYPE_CHECKING:
    from torch import Tensor

Network = TypeVar("Network", bound="Placed")
DeviceMap = str | Mapping[str, torch.device | str | int]

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
# accelerate's words are computed where somebody asks for them.
_AUTOMATIC = "hooklens.model.placement.automatic"


def read_kind(given: object, *, what: str, error: type[HookLensError] = InputError) -> Any:
    """What a device map can be; whether it fits a network is known when that is.

    Raises:
        HookLensError: neither one of `AUTOMATIC` nor a mapping.
    """
    if isinstance(given, Mapping) or (isinstance(given, str) and given in AUTOMATIC):
        return given
    words = ", ".join(map(repr, AUTOMATIC))
    raise refusal(given, what, f"{words}, or devices by part of the network; one device is device=", error)


read_max_memory = optional(partial(require, kind=Mapping, expected="bytes, or texts such as '10GiB', by device"))


def plan_placement(
    device_map: DeviceMap,
    cfg: HookedConfig,
    dtype: torch.dtype,
    make_meta: Callable[[HookedConfig], nn.Module],
    *,
    max_memory: Mapping[Any, int | str] | None = None,
) -> Placement:
    """Where the parts of a network are to lie, before it has any weights.

    Args:
        device_map: one of `AUTOMATIC`, or a mapping.
        cfg: the network.
        dtype: of its weights.
        make_meta: makes the network.
        max_memory: what an automatic placement may use.

    Raises:
        InputError: see `read_device_map` and `spread_network`.
        MissingDependencyError: an automatic placement without accelerate.
    """
    if isinstance(device_map, str):
        with torch.device("meta"):
            meta = make_meta(cfg).to(dtype)
        placement: Placement = import_package(_AUTOMATIC).spread_network(meta, cfg, device_map, max_memory)
        return placement
    if max_memory is not None:
        raise InputError("max_memory goes with an automatic device_map ('auto'); a mapping says itself what goes where")
    return read_device_map(device_map, cfg)


class Placed:
    """A network whose parts may lie on several devices; a call brings the stream to each part.

    Attributes:
        placement: of a network on several devices, found anew where parameters move; None: it lies on one.
    """

    cfg: HookedConfig
    placement: Placement | None = None

    if TYPE_CHECKING:

        @property
        def device(self) -> torch.device:
            """Where token ids go."""
            ...

        @property
        def dtype(self) -> torch.dtype:
            """The dtype of the weights."""
            ...

    @property
    def device_map(self) -> dict[str, torch.device]:
        """The device of each part: `{"embed": ..., "blocks.0": ..., ..., "unembed": ...}`."""
        return dict.fromkeys(list_parts(self.cfg), self.device) if self.placement is None else dict(self.placement)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the network lies on, each once, that of the embedding first."""
        return (self.device,) if self.placement is None else self.placement.all

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """Where each block computes, and where its keys and values are cached."""
        return (self.device,) * self.cfg.n_layers if self.placement is None else self.placement.layers

    @property
    def cache_device(self) -> torch.device | tuple[torch.device, ...]:
        """Where keys and values lie: on the network's one device, or each layer's on that of its block."""
        return self.device if self.placement is None else self.placement.layers

    @reads(device_map=read_kind, max_memory=read_max_memory)
    def dispatch(self: Network, device_map: DeviceMap, *, max_memory: Mapping[Any, int | str] | None = None) -> Network:
        """Put the parts of the network on several devices, in place; returns the network.

        From here on a call brings the residual stream to each block's device, and hook points fire there.
        `model.device` is that of the embedding, where token ids go; logits come out on the unembedding's. `to(device)`
        puts all parts on one device again.

        Args:
            device_map: `"auto"` (as `"balanced"`: the same share for each accelerator), `"balanced_low_0"` (little on
                the first), `"sequential"` (each is filled before the next), or devices by part of the network, as in
                `from_pretrained`.
            max_memory: what an automatic placement may use: bytes or a text such as `"10GiB"` by number of an
                accelerator, or `"cpu"`. None: what is free.

        Raises:
            InputError: names, devices or memory that do not fit the network; all are listed, and nothing has moved.
            MissingDependencyError: an automatic placement without accelerate.
        """
        decoder: Any = self
        refuse_shared(decoder, "dispatch", InputError)
        if self.device.type == "meta":
            raise InputError("dispatch: the network lies on the device 'meta' and has no weights to put anywhere")
        make_meta: Any = type(self)
        placement = plan_placement(device_map, self.cfg, self.dtype, make_meta, max_memory=max_memory)
        try:
            # Parameters made under inference_mode could never be trained.
            with torch.inference_mode(mode=False):
                for part, device in placement.items():
                    decoder.get_submodule(part).to(device)
        finally:
            self.settle_placement(placement)
        return self

    def settle_placement(self, placement: Placement | None) -> None:
        """Take note of where the parts lie now; `placement` says it of those without parameters."""
        decoder: Any = self
        found = find_placement(decoder, self.cfg, placement)
        self.placement = found if found is not None and len(found.all) > 1 else None

    def _apply(self: Network, fn: "Callable[[Tensor], Tensor]", recurse: bool = True) -> Network:  # noqa: FBT001, FBT002
        """What `to`, `cuda`, `half` and their like call: parameters may lie elsewhere after it."""
        moved: Network = super()._apply(fn, recurse)  # type: ignore[misc]
        if self.placement is not None:
            self.settle_placement(self.placement)
        return moved
