"""A network whose parts may lie on several devices."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from hooklens.arguments import optional, read_path, reads, refusal, require
from hooklens.config import HookedConfig
from hooklens.errors import HookLensError, InputError
from hooklens.model.placement.offloading import check_offloadable, move_parts, open_offload
from hooklens.model.placement.placement import (
    Placement,
    find_placement,
    list_parts,
    part_of,
    read_device_map,
    read_part_device,
)
from hooklens.model.placement.shared_weights import refuse_shared
from hooklens.optional import import_package
from hooklens.weights.offloaded import Lies, offloaded_parameters, refuse_offloaded, values_of

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


def _read_execution_device(given: object, *, what: str, error: type[HookLensError] = InputError) -> torch.device:
    try:
        return read_part_device(given, what=what)
    except HookLensError as found:
        raise error(str(found)) from None


read_max_memory = optional(partial(require, kind=Mapping, expected="bytes, or texts such as '10GiB', by device"))
read_offload_folder = optional(read_path)
read_execution_device = optional(_read_execution_device)


def plan_placement(
    device_map: DeviceMap,
    cfg: HookedConfig,
    dtype: torch.dtype,
    make_meta: Callable[[HookedConfig], nn.Module],
    *,
    max_memory: Mapping[Any, int | str] | None = None,
    may_spill: bool = False,
    execution_device: torch.device | None = None,
) -> Placement:
    """Where the parts of a network are to lie, before it has any weights.

    Args:
        device_map: one of `AUTOMATIC`, or a mapping.
        cfg: the network.
        dtype: of its weights.
        make_meta: makes the network.
        max_memory: what an automatic placement may use.
        may_spill: what finds no room in an automatic placement goes to the disk.
        execution_device: where parts on the CPU and the disk compute.

    Raises:
        InputError: see `read_device_map` and `spread_network`.
        MissingDependencyError: an automatic placement without accelerate.
    """
    if isinstance(device_map, str):
        with torch.device("meta"):
            meta = make_meta(cfg).to(dtype)
        placement: Placement = import_package(_AUTOMATIC).spread_network(
            meta, cfg, device_map, max_memory, may_spill=may_spill, execution_device=execution_device
        )
        return placement
    if max_memory is not None:
        raise InputError("max_memory goes with an automatic device_map ('auto'); a mapping says itself what goes where")
    placement = read_device_map(device_map, cfg, execution_device=execution_device)
    if execution_device is not None and not placement.offloaded and torch.device("cpu") not in placement.all:
        raise InputError(
            f"execution_device={str(execution_device)!r} says where parts on 'cpu' and 'disk' compute, and device_map "
            "puts none there; leave it out"
        )
    return placement


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
        """The device that each part computes on: `{"embed": ..., "blocks.0": ..., ..., "unembed": ...}`."""
        return dict.fromkeys(list_parts(self.cfg), self.device) if self.placement is None else dict(self.placement)

    @property
    def offloaded(self) -> dict[str, Lies]:
        """The parts that do not lie where they compute: `"disk"`, or `"cpu"` for another device."""
        decoder: Any = self
        return {part_of(name): held.lies for name, held in offloaded_parameters(decoder)}

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the network computes on, each once, that of the embedding first."""
        return (self.device,) if self.placement is None else self.placement.all

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """Where each block computes, and where its keys and values are cached."""
        return (self.device,) * self.cfg.n_layers if self.placement is None else self.placement.layers

    @property
    def cache_device(self) -> torch.device | tuple[torch.device, ...]:
        """Where keys and values lie: on the network's one device, or each layer's on that of its block."""
        return self.device if self.placement is None else self.placement.layers

    @reads(
        device_map=read_kind,
        max_memory=read_max_memory,
        offload_folder=read_offload_folder,
        execution_device=read_execution_device,
    )
    def dispatch(
        self: Network,
        device_map: DeviceMap,
        *,
        max_memory: Mapping[Any, int | str] | None = None,
        offload_folder: str | Path | None = None,
        execution_device: torch.device | str | int | None = None,
    ) -> Network:
        """Put the parts of the network on several devices or on the disk, in place; returns the network.

        From here on a call brings the residual stream to each block's device, and hook points fire there.
        `model.device` is that of the embedding, where token ids go; logits come out on the unembedding's. `to(device)`
        puts all parts on one device again; where some are offloaded, `dispatch({"": device})` does.

        Weights that are offloaded, on the disk or on the CPU for another device, cannot be changed or trained; each is
        brought to its device for the operator that reads it. Gradients of activations go through them.

        Args:
            device_map: `"auto"` (as `"balanced"`: the same share for each accelerator), `"balanced_low_0"` (little on
                the first), `"sequential"` (each is filled before the next), or devices by part of the network, as in
                `from_pretrained`.
            max_memory: what an automatic placement may use: bytes or a text such as `"10GiB"` by number of an
                accelerator, or `"cpu"`. None: what is free.
            offload_folder: where the weights of parts on `"disk"` are written, as in `from_pretrained`.
            execution_device: where parts on `"cpu"` and `"disk"` compute, as in `from_pretrained`.

        Raises:
            InputError: names, devices or memory that do not fit the network; all are listed, and nothing has moved. Or
                parts that are to be offloaded hold quantised weights or have adapters beside them, or the folder cannot
                be written to or has too little room.
            MissingDependencyError: an automatic placement without accelerate.
        """
        decoder: Any = self
        refuse_shared(decoder, "dispatch", InputError)
        if self.device.type == "meta":
            raise InputError("dispatch: the network lies on the device 'meta' and has no weights to put anywhere")
        make_meta: Any = type(self)
        # Read above.
        computes: Any = execution_device
        folder: Any = offload_folder
        placement = plan_placement(
            device_map,
            self.cfg,
            self.dtype,
            make_meta,
            max_memory=max_memory,
            may_spill=folder is not None,
            execution_device=computes,
        )
        check_offloadable(decoder, placement)
        offload = open_offload(placement, self.cfg, self.dtype, folder, device_map=device_map)
        try:
            # Parameters made under inference_mode could never be trained.
            with torch.inference_mode(mode=False):
                move_parts(decoder, placement, offload)
        finally:
            self.settle_placement(placement)
        return self

    def settle_placement(self, placement: Placement | None) -> None:
        """Take note of where the parts lie now; `placement` says it of those without parameters."""
        decoder: Any = self
        found = find_placement(decoder, self.cfg, placement)
        self.placement = found if found is not None and len(found.all) > 1 else None

    def _apply(self: Network, fn: "Callable[[Tensor], Tensor]", recurse: bool = True) -> Network:  # noqa: FBT001, FBT002
        """What `to`, `cuda`, `half` and their like call: parameters may lie elsewhere after it.

        Raises:
            InputError: weights are offloaded.
        """
        decoder: Any = self
        refuse_offloaded(
            decoder,
            "to, cuda, half and their like would bring all weights into the memory of one device",
            InputError,
            otherwise='model.dispatch({"": device}) does so where that is wanted, and from_pretrained(dtype=...) '
            "converts weights while they are read",
        )
        moved: Network = super()._apply(fn, recurse)  # type: ignore[misc]
        if self.placement is not None:
            self.settle_placement(self.placement)
        return moved

    def state_dict(self, *arguments: Any, **keywords: Any) -> Any:
        """The parameters by name, as `nn.Module.state_dict` gives them; offloaded ones as they lie on the CPU."""
        state = super().state_dict(*arguments, **keywords)  # type: ignore[misc]
        if keywords.get("keep_vars"):
            return state
        for name, value in state.items():
            state[name] = values_of(value) if isinstance(value, torch.Tensor) else value
        return state

    def requires_grad_(self, requires_grad: bool = True) -> Any:  # noqa: FBT001, FBT002
        """Have the gradients of all parameters recorded, or of none, as `nn.Module.requires_grad_` does.

        Raises:
            InputError: they are to be recorded, and weights are offloaded; nothing has changed.
        """
        decoder: Any = self
        if requires_grad:
            refuse_offloaded(
                decoder,
                "requires_grad_: offloaded weights are not trained",
                InputError,
                otherwise='model.dispatch({"": device}) brings them into memory; an adapter beside them (add_adapter) '
                "can be trained as they are",
            )
        return super().requires_grad_(requires_grad)  # type: ignore[misc]
