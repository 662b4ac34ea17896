"""Parts whose weights lie on the disk, or in the CPU's memory for another device, and the files of the first.

A weight on the disk is written once, into a file of its own, and mapped: the system reads its pages when they are
touched, and gives them back when memory is short. A file loses its name as soon as it is mapped: so nobody can damage
it while it is read, and it goes with the last tensor that reads it, however the process ends. A system that does not
remove a mapped file (Windows) leaves it in the folder.
"""

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from hooklens.config import HookedConfig
from hooklens.display import format_bytes
from hooklens.errors import InputError, join_names
from hooklens.model.parts.adapted import adapted_maps
from hooklens.model.parts.quantised import quantised_maps
from hooklens.model.placement.placement import Placement, part_of
from hooklens.weights.offloaded import OffloadedTensor, offload

_PIECE = 2**24
_WHERE = "expected a folder on a disk that can be written to and has room for what does not fit into memory"


class OffloadFolder:
    """A folder that weights are written to, and mapped from.

    Args:
        path: the folder, which is made where there is none.
        needed: bytes that will be written.

    Raises:
        InputError: it cannot be written to, or has too little room.
    """

    def __init__(self, path: Path, needed: int) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            free = shutil.disk_usage(path).free
        except OSError as error:
            raise InputError(f"offload_folder={str(path)!r} cannot be written to ({error}); {_WHERE}") from error
        if free < needed:
            raise InputError(
                f"offload_folder={str(path)!r}: the parts on the disk take {format_bytes(needed)}, and "
                f"{format_bytes(free)} are free there; {_WHERE}"
            )

    def write(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The same values, mapped from a file, with the strides that they have in memory.

        They are written through the mapping, so that no memory is taken for a converted copy.

        Args:
            name: of the weight, for messages.
            tensor: on any device, without gaps between its entries.
            dtype: of what is written; None: that of the tensor.

        Raises:
            InputError: there is no room for the file.
        """
        dtype = tensor.dtype if dtype is None else dtype
        if not tensor.numel():
            return tensor.to("cpu", dtype, copy=True)
        # By columns, or whatever the order of the axes is, entries go into the file as they lie in memory.
        order = sorted(range(tensor.ndim), key=lambda axis: (tensor.stride(axis), -axis), reverse=True)
        n_bytes = tensor.numel() * dtype.itemsize
        path = None
        try:
            number, made = tempfile.mkstemp(prefix="hooklens-", suffix=".weight", dir=self.path)
            path = Path(made)
            with os.fdopen(number, "wb") as file:
                _take_room(file, n_bytes)
            storage: Any = torch.UntypedStorage.from_file(str(path), True, n_bytes)  # noqa: FBT003
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"offload_folder={str(self.path)!r}: {name!r} of {format_bytes(n_bytes)} could not be written "
                f"there ({error}); {_WHERE}"
            ) from error
        finally:
            if path is not None:
                with contextlib.suppress(PermissionError):
                    path.unlink()
        mapped = torch.empty(0, dtype=dtype).set_(storage).view([tensor.shape[axis] for axis in order])
        return mapped.permute([order.index(axis) for axis in range(tensor.ndim)]).copy_(tensor.detach())


def _take_room(file: BinaryIO, n_bytes: int) -> None:
    """Make a file of a size whose bytes have their place on the disk: to write to it cannot fail later."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, n_bytes)
        return
    for start in range(0, n_bytes, _PIECE):
        file.write(bytes(min(_PIECE, n_bytes - start)))


class Offload:
    """Where each weight of a network goes that does not lie where it computes.

    Args:
        placement: of the network's parts.
        folder: where files are written; None: no part lies on the disk.
    """

    def __init__(self, placement: Placement, folder: OffloadFolder | None) -> None:
        self._placement, self._folder = placement, folder

    def takes(self, name: str) -> bool:
        """Whether a weight or parameter of that name is offloaded."""
        return part_of(name) in self._placement.offloaded

    def put(self, name: str, tensor: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
        """The parameter of a weight that is offloaded.

        Args:
            name: of the weight or parameter.
            tensor: as it is stored.
            dtype: of the parameter; None: that of the tensor.

        Raises:
            InputError: its file cannot be written.
        """
        part = part_of(name)
        device, lies = self._placement[part], self._placement.offloaded[part]
        if isinstance(tensor, OffloadedTensor):
            if tensor.lies == lies:
                return offload(tensor.held, device, lies)
            tensor = tensor.held
        if lies == "cpu":
            return offload(tensor.detach().to("cpu", dtype, copy=True), device, lies)
        assert self._folder is not None
        return offload(self._folder.write(name, tensor, dtype), device, lies)


def open_offload(
    placement: Placement, cfg: HookedConfig, dtype: torch.dtype, folder: Path | None, *, device_map: object
) -> Offload | None:
    """What offloads the parts of a placement; None: none is offloaded.

    Args:
        placement: where they go.
        cfg: the network.
        dtype: of its weights.
        folder: where files are written.
        device_map: what was asked for, for messages.

    Raises:
        InputError: parts go to the disk without a folder, or a folder with a mapping that puts nothing there; or the
            folder cannot be written to, or has too little room.
    """
    on_disk = [part for part, lies in placement.offloaded.items() if lies == "disk"]
    if on_disk and folder is None:
        raise InputError(
            f"device_map puts {join_names(on_disk, limit=6)} on 'disk', and no offload_folder was given; give the "
            "folder that their weights are written to"
        )
    if folder is not None and not on_disk and isinstance(device_map, Mapping):
        raise InputError("offload_folder goes with parts on 'disk', and device_map puts none there; leave it out")
    if not placement.offloaded:
        return None
    opened = None
    if on_disk and folder is not None:
        opened = OffloadFolder(folder, _count_bytes(cfg, dtype, frozenset(on_disk)))
    return Offload(placement, opened)


def _count_bytes(cfg: HookedConfig, dtype: torch.dtype, parts: frozenset[str]) -> int:
    tied = {"unembed.W_U"} if cfg.tied_unembed else set()
    weights = cfg.description.weights.items()
    return sum(
        math.prod(weight.shape) * dtype.itemsize
        for name, weight in weights
        if part_of(name) in parts and name not in tied
    )


def check_offloadable(network: nn.Module, placement: Placement) -> None:
    """Refuse to offload parts that hold more than plain weights.

    Raises:
        InputError: some of their weights are quantised, or have adapters beside them.
    """
    maps = {**quantised_maps(network), **adapted_maps(network)}
    wrong = [name for name in maps if part_of(name) in placement.offloaded]
    if wrong:
        raise InputError(
            f"device_map offloads parts with quantised weights, or with adapters beside them: {join_names(wrong)}; put "
            "these parts on devices, or take the plain model (model.dequantize(), model.merge_adapter())"
        )


def move_parts(network: Any, placement: Placement, offload: Offload | None) -> None:
    """Bring the parts of a network where a placement has them, in place.

    Raises:
        InputError: files cannot be written.
    """
    for part, device in placement.items():
        module: nn.Module = network.get_submodule(part)
        if part in placement.offloaded and offload is not None:
            _replace_parameters(module, part, offload.put)
            for inside in module.modules():
                inside._buffers = {
                    name: None if one is None else one.to(device) for name, one in inside._buffers.items()
                }
        else:
            _replace_parameters(module, part, partial(_take_back, device))
            module.to(device)


def _take_back(device: torch.device, name: str, tensor: Tensor) -> Tensor:
    """An ordinary parameter in the place of one that is offloaded."""
    if not isinstance(tensor, OffloadedTensor):
        return tensor
    # What was held may be other models', too.
    plain = tensor.held.to(device, copy=True)
    return nn.Parameter(plain, requires_grad=plain.is_floating_point())


def _replace_parameters(module: nn.Module, name: str, make: Callable[[str, Tensor], Tensor]) -> None:
    """Put in the place of each parameter of a part what is made of its name in the network, and of itself."""
    for path, inside in module.named_modules(prefix=name):
        for own, parameter in inside._parameters.items():
            if parameter is not None:
                made: Any = make(f"{path}.{own}", parameter)
                inside._parameters[own] = made
