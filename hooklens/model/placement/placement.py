"""Which device each part of a network lies on: embedding, blocks, final norm, unembedding.

A part lies on one device whole. A mapping names parts as `state_dict()` does,
`{"embed": 0, "blocks": 1, "unembed": 1}`; `""` is the whole network, `"blocks"` all its blocks. A part may compute on a
device and lie elsewhere, see `hooklens.weights.offloaded`.
"""

from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hooklens.arguments import read_device, show
from hooklens.config import HookedConfig
from hooklens.errors import HookLensError, InputError, join_names, suggest_names
from hooklens.model.embed import embeds_positions
from hooklens.weights.offloaded import Lies

_TIED = "unembed.W_U"
_CPU = torch.device("cpu")

Place: TypeAlias = torch.device | Literal["disk"]
"""Where the weights of a part are to lie."""
_Named = TypeVar("_Named", bound=Place)


class Placement(Mapping[str, torch.device]):
    """The device of each part, by name: `"embed"`, `"blocks.0"`, ..., `"unembed"`; never changed once it is made.

    Args:
        devices: that all parts of the network compute on, in order.
        offloaded: what the weights of a part lie in, where that is not its device's memory.

    Attributes:
        offloaded: as given.
        layers: those of the blocks, by layer.
        all: all of them, each once, that of the embedding first.
    """

    def __init__(self, devices: dict[str, torch.device], offloaded: Mapping[str, Lies] | None = None) -> None:
        self._devices = devices
        self.offloaded: dict[str, Lies] = dict(offloaded or {})
        self.layers = tuple(device for name, device in devices.items() if name.startswith("blocks."))
        self.all = tuple(dict.fromkeys(devices.values()))

    def __getitem__(self, name: str) -> torch.device:
        return self._devices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._devices)

    def __len__(self) -> int:
        return len(self._devices)

    def __repr__(self) -> str:
        return f"Placement({', '.join(f'{name!r}: {str(device)!r}' for name, device in self._devices.items())})"

    def of_weight(self, name: str) -> torch.device:
        """Where a weight or parameter computes."""
        return self._devices[part_of(name)]


def part_of(name: str) -> str:
    """The part that a weight, parameter or module is in: `"blocks.3"` for `"blocks.3.attn.W_Q"`."""
    words = name.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]


def list_parts(cfg: HookedConfig) -> list[str]:
    """The parts of a network, in the order in which a call goes through them."""
    parts = ["embed", *["pos_embed"] * embeds_positions(cfg), *(f"blocks.{layer}" for layer in range(cfg.n_layers))]
    return [*parts, *["ln_final"] * (cfg.final_norm is not None), "unembed"]


def find_place(state: Mapping[str, Tensor], cfg: HookedConfig) -> Placement | torch.device:
    """Where a network made of these weights lies: each part on the device of its weights, if it has only one.

    Otherwise, and of parts of a tied embedding that lie apart, the whole network lies with the embedding.
    """
    found: dict[str, set[torch.device]] = {}
    for name, weight in state.items():
        if not (cfg.tied_unembed and name == _TIED):
            found.setdefault(part_of(name), set()).add(weight.device)
    home = next(iter(found.get("embed", ())), torch.device("cpu"))
    whole = all(len(devices) == 1 for devices in found.values())
    apart = cfg.tied_unembed and found.get("unembed", {home}) != {home}
    if not whole or apart or len(set().union(*found.values())) < 2:
        return home
    return Placement(_fill_in({part: next(iter(devices)) for part, devices in found.items()}, cfg))


def find_placement(network: nn.Module, cfg: HookedConfig, before: Placement | None = None) -> Placement | None:
    """Where the parts of a network lie by their parameters; None: all on one device.

    A part without parameters lies where `before` has it, while no part has gone elsewhere; else beside another one.
    """
    found: dict[str, torch.device] = {}
    parts = frozenset(list_parts(cfg))
    for name, parameter in network.named_parameters():
        # Somebody may have put a module of their own beside the parts.
        if (part := part_of(name)) in parts:
            found.setdefault(part, parameter.device)
    if before is not None and all(before[part] == device for part, device in found.items()):
        return before
    if len(set(found.values())) < 2:
        return None
    return Placement(_fill_in(found, cfg))


def _fill_in(devices: dict[str, _Named], cfg: HookedConfig) -> dict[str, _Named]:
    """The devices of all parts: those that are not named have no weights, and lie where what they read comes from."""
    filled: dict[str, _Named] = {}
    for part in list_parts(cfg):
        before = "embed" if part == "unembed" else next(reversed(filled), "embed")
        filled[part] = devices[part] if part in devices else filled[before]
    return filled


def offload_parts(
    places: Mapping[str, Place], cfg: HookedConfig, execution_device: torch.device | None = None
) -> Placement:
    """The placement of parts of which some lie on the disk, or in the CPU's memory for another device.

    Args:
        places: of all parts, in order.
        cfg: the network.
        execution_device: where parts on the CPU and the disk compute. None: those on the CPU there, those on the disk
            on the first other device that a part lies on, else on the CPU.
    """
    others = (place for place in places.values() if place != "disk" and place.type != "cpu")
    main = next(others, _CPU) if execution_device is None else execution_device
    streams = execution_device is not None and execution_device.type != "cpu"
    tied = {_TIED} if cfg.tied_unembed else set()
    held = {part_of(weight) for weight in cfg.description.weights if weight not in tied}
    devices: dict[str, torch.device] = {}
    offloaded: dict[str, Lies] = {}
    for part, place in places.items():
        lies: Lies | None = None
        if place == "disk":
            lies = "disk"
        elif place.type == "cpu" and streams:
            lies = "cpu"
        devices[part] = place if lies is None and place != "disk" else main
        if lies is not None and part in held:
            offloaded[part] = lies
    return Placement(devices, offloaded)


def read_device_map(
    given: object, cfg: HookedConfig, *, execution_device: torch.device | None = None, what: str = "device_map"
) -> Placement:
    """A mapping from names of parts to devices, or `"disk"`.

    Args:
        given: the mapping.
        cfg: the network.
        execution_device: see `offload_parts`.
        what: the argument, for messages.

    Raises:
        InputError: no mapping; or names that the network does not have, parts without or with several devices, devices
            that there are not or that hold no weights; all are listed.
    """
    if not isinstance(given, Mapping) or not given:
        raise InputError(f"{what} is {show(given)}, expected a mapping from parts of the network to devices")
    parts = list_parts(cfg)
    problems: list[str] = []
    named: dict[str, list[str]] = {part: [] for part in parts}
    devices: dict[str, Place] = {}
    for name, device in given.items():
        covered = _find_covered(name, parts)
        if not covered:
            problems.append(_describe_unknown(name, cfg, parts))
        for part in covered:
            named[part].append(name)
        try:
            placed = read_place(device, what=f"{what}[{name!r}]")
        except HookLensError as error:
            problems.append(str(error))
            continue
        devices.update(dict.fromkeys(covered, placed))
    held = {part_of(weight) for weight in cfg.description.weights}
    if cfg.tied_unembed:
        held.discard("unembed")
    missing = [part for part, names in named.items() if not names and part in held]
    if missing:
        problems.append(f"no device for {join_names(missing)}")
    doubled = [f"{part!r} (by {join_names(names)})" for part, names in named.items() if len(names) > 1]
    if doubled:
        problems.append(f"several devices for {', '.join(doubled)}; name each part once")
    if problems:
        raise InputError(f"{what}: {'; '.join(problems)}. The parts of this network are {_summarise(parts)}")
    placed_all = _fill_in(devices, cfg)
    if cfg.tied_unembed and placed_all["unembed"] != placed_all["embed"]:
        raise InputError(
            f"{what}: 'embed' is put on {placed_all['embed']} and 'unembed' on {placed_all['unembed']}, but the "
            "unembedding is tied to the embedding: they are one weight. Put both on one device"
        )
    return offload_parts(placed_all, cfg, execution_device)


def read_place(given: object, *, what: str) -> Place:
    """Where the weights of a part can lie: a device, or `"disk"`.

    Raises:
        InputError: neither.
    """
    return "disk" if isinstance(given, str) and given == "disk" else read_part_device(given, what=what)


def read_part_device(given: object, *, what: str) -> torch.device:
    """A device that a part of a network can compute on.

    Raises:
        InputError: none, or one that holds no weights.
    """
    device = read_device(given, what=what)
    if device.type == "meta":
        raise InputError(f"{what} is {show(given)}, where tensors have no values; expected a device that computes")
    return device


def _find_covered(name: object, parts: list[str]) -> list[str]:
    """The parts that a name of a mapping stands for."""
    if name == "":
        return list(parts)
    return [part for part in parts if name in (part, part.partition(".")[0])]


def _describe_unknown(name: object, cfg: HookedConfig, parts: list[str]) -> str:
    if not isinstance(name, str):
        return f"{show(name)} is no name"
    whole = part_of(name)
    if whole in parts:
        return f"{name!r} lies inside {whole!r}, and a part lies on one device whole"
    reason = cfg.description.why_absent(name)
    if reason is not None:
        return f"the network has no {name!r}: {reason}"
    return f"the network has no part {name!r}.{suggest_names(name, [*parts, 'blocks'])}"


def _summarise(parts: list[str]) -> str:
    blocks = [part for part in parts if part.startswith("blocks.")]
    few = blocks if len(blocks) < 4 else [blocks[0], "...", blocks[-1]]
    rest = [part for part in parts if part not in blocks]
    names = [*(part for part in rest if part in ("embed", "pos_embed")), *few, *rest[-2:]]
    return ", ".join(dict.fromkeys(names))
