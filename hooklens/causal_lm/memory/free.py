"""How much memory is free on a device, as far as the system says."""

import os
from pathlib import Path

import torch

# What a container may hold, what it holds, and the files in that which are given up for others (cgroup v2, then v1).
_CONTAINERS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
_GROUPS = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")
_WHERE_NOT_KNOWN = 4 * 2**30


def free_bytes(device: torch.device) -> int | None:
    """Bytes that tensors can still take on a device; None where that is not known.

    On CUDA what torch holds and does not use counts as free; on the CPU what the system would give up for a process
    does, such as files it keeps in memory, and the limit of a container holds.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    known = [size for size in (_free_of_system(), _free_of_container()) if size is not None]
    return min(known, default=None)


def assume_free_bytes(device: torch.device) -> int:
    """The same, to choose the size of batches by; 4 GiB where it is not known."""
    known = free_bytes(device)
    return _WHERE_NOT_KNOWN if known is None else known


def _free_of_system() -> int | None:
    for line in _read(_MEMINFO).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _free_of_container() -> int | None:
    for limit_name, used_name, files_name in _CONTAINERS:
        limit, used = _read(_GROUPS / limit_name).strip(), _read(_GROUPS / used_name).strip()
        if limit.isdecimal() and used.isdecimal():
            stat = _read((_GROUPS / used_name).with_name("memory.stat"))
            files = dict(line.split() for line in stat.splitlines()).get(files_name, "0")
            return max(0, int(limit) - int(used) + int(files))
    return None


def _read(path: Path) -> str:
    """The text of a file of the system; empty where there is none to be read."""
    try:
        return path.read_text()
    except OSError:
        return ""
