"""A network spread over the devices of a machine by their memory: what accelerate computes from the sizes of the parts.

accelerate is asked for the placement only, and nothing of it runs in a call. A part that finds no room on the
accelerators lies on the CPU, and one that finds none there on the disk, where the caller has a folder for it.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from hooklens.arguments import read_int, show
from hooklens.config import HookedConfig
from hooklens.errors import HookLensError, InputError, join_names
from hooklens.model.placement.placement import Place, Placement, list_parts, offload_parts, read_part_device, read_place
from hooklens.optional import import_package

Automatic = Literal["auto", "balanced", "balanced_low_0", "sequential"]
_BY_NAME = ("mps", "cpu")


def spread_network(
    meta: nn.Module,
    cfg: HookedConfig,
    kind: Automatic,
    max_memory: Mapping[Any, int | str] | None,
    *,
    may_spill: bool = False,
    execution_device: torch.device | None = None,
    what: str = "device_map",
) -> Placement:
    """Where the parts of a network go.

    Args:
        meta: the network, in the dtype that it is to have, on the meta device; it is changed.
        cfg: its config.
        kind: `"auto"` and `"balanced"`: the same share for each accelerator; `"balanced_low_0"`: little on the first;
            `"sequential"`: each is filled before the next.
        max_memory: bytes, or a text such as `"10GiB"`, by number of an accelerator, or `"cpu"`; what is left out is not
            used. None: what is free.
        may_spill: parts that find no room on any device lie on the disk.
        execution_device: see `hooklens.model.placement.placement.offload_parts`.
        what: the argument, for messages.

    Raises:
        InputError: memory of devices that there are not, or too little for the network.
        MissingDependencyError: accelerate is not installed.
    """
    memory = None if max_memory is None else read_memory(max_memory)
    for key in memory or ():
        read_part_device(key, what=f"max_memory: {key!r}")
    found = spread_parts(meta, cfg, kind, memory, may_spill=may_spill, what=what)
    places: dict[int | str, Place] = {place: read_place(place, what=what) for place in set(found.values())}
    placed: dict[str, Place] = {part: places[place] for part, place in found.items()}
    return offload_parts(placed, cfg, execution_device)


def read_memory(given: object) -> dict[int | str, int]:
    """Bytes by number of an accelerator, `"mps"` or `"cpu"`.

    Raises:
        InputError: other devices or amounts; all are listed.
    """
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"max_memory is {show(given)}, expected bytes, or texts such as '10GiB', by device")
    read: dict[int | str, int] = {}
    problems = []
    for key, amount in given.items():
        try:
            read[_read_key(key)] = _read_amount(amount, what=f"max_memory[{key!r}]")
        except HookLensError as error:
            problems.append(str(error))
    if problems:
        raise InputError("; ".join(problems))
    return read


def _read_key(key: object) -> int | str:
    if key == "disk":
        raise InputError("max_memory: 'disk' has no bound: what finds no room goes there, if offload_folder= is given")
    if isinstance(key, str) and key not in _BY_NAME:
        kind, _, number = key.partition(":")
        key = int(number) if kind != "cpu" and number.isdecimal() else key
    elif isinstance(key, torch.device):
        key = key.type if key.type in _BY_NAME else key.index
    if isinstance(key, str) and key in _BY_NAME:
        return key
    return read_int(key, what="max_memory: a device", least=0)


def _read_amount(given: object, *, what: str) -> int:
    if not isinstance(given, str):
        return read_int(given, what=what, least=0)
    try:
        amount: int = import_package("accelerate.utils").convert_file_size_to_int(given)
    except ValueError:
        raise InputError(f"{what} is {show(given)}, expected bytes, or a text such as '10GiB'") from None
    return amount


def spread_parts(
    meta: nn.Module,
    cfg: HookedConfig,
    kind: Automatic,
    memory: dict[int | str, int] | None,
    *,
    may_spill: bool = False,
    what: str = "device_map",
) -> dict[str, int | str]:
    """The number of an accelerator, the name of a device, or `"disk"`, for each part; see `spread_network`."""
    utils: Any = import_package("accelerate.utils")
    parts = list_parts(cfg)
    available = utils.get_max_memory(None if memory is None else dict(memory))
    if memory is None and not may_spill and not any(isinstance(key, int) or key == "mps" for key in available):
        return dict.fromkeys(parts, "cpu")
    skeleton = _bare_network(meta, cfg)
    whole = sorted({type(meta.get_submodule(part)).__name__ for part in parts})
    if kind != "sequential":
        available = utils.get_balanced_memory(
            skeleton,
            max_memory=None if memory is None else dict(memory),
            no_split_module_classes=whole,
            low_zero=kind == "balanced_low_0",
        )
    found = utils.infer_auto_device_map(
        skeleton, max_memory=available, no_split_module_classes=whole, clean_result=False
    )
    found = {name.partition("_")[2]: place for name, place in found.items()}
    places = {part: found[part] if part in found else found[part.partition(".")[0]] for part in parts}
    if cfg.tied_unembed:
        places["unembed"] = places["embed"]
    homeless = [part for part, place in places.items() if place == "disk"]
    if homeless and not may_spill:
        raise InputError(_describe_shortage(meta, homeless, available, n_layers=cfg.n_layers, what=what))
    return places


def _bare_network(meta: nn.Module, cfg: HookedConfig) -> nn.Module:
    """The parts alone, in order, with one parameter in both places where it is tied."""
    skeleton = nn.Module()
    tops = dict.fromkeys(part.partition(".")[0] for part in list_parts(cfg))
    for place, name in enumerate(tops):
        # accelerate looks for "embed." anywhere in the names of tied parameters, and would find it in "unembed.".
        skeleton.add_module(f"{place}_{name}", meta.get_submodule(name))
    if cfg.tied_unembed:
        meta.get_submodule("unembed").register_parameter("tied", next(meta.get_submodule("embed.table").parameters()))
    return skeleton


def _describe_shortage(
    meta: nn.Module, homeless: list[str], memory: Mapping[int | str, int], *, n_layers: int, what: str
) -> str:
    needed = sum(parameter.nbytes for parameter in meta.parameters())
    listed = ", ".join(f"{key}: {_show_bytes(amount)}" for key, amount in memory.items() if key != "disk")
    return (
        f"{what}: no room for {join_names(homeless, limit=6)} of {n_layers} blocks. The weights take "
        f"{_show_bytes(needed)}, devices may hold {listed}, of which some stays free for the largest block. "
        "Give a folder on the disk for the rest (offload_folder=), allow more (max_memory=), load fewer layers "
        "(layers=) or a narrower dtype, or say where each part goes (device_map={...})"
    )


def _show_bytes(amount: float) -> str:
    return f"{amount / 2**30:.2f} GiB" if amount >= 2**27 else f"{amount / 2**20:.2f} MiB"
