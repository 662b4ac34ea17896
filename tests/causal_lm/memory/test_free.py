"""What the system says of free memory."""

from pathlib import Path

import pytest
import torch

from hooklens.causal_lm.memory import free
from hooklens.causal_lm.memory.free import free_bytes


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's files, with 8 GiB available and no container."""
    (tmp_path / "meminfo").write_text("MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")
    monkeypatch.setattr(free, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free, "_GROUPS", tmp_path / "cgroup")
    return tmp_path


def test_files_kept_in_memory_count_as_free(system: Path) -> None:
    """`MemFree` leaves out what Linux keeps of files and gives up for a process."""
    assert free_bytes(torch.device("cpu")) == 8 * 2**30


@pytest.mark.parametrize(
    ("folder", "limit", "used", "files"),
    [
        ("", "memory.max", "memory.current", "inactive_file"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_containers_limit_holds(system: Path, folder: str, limit: str, used: str, files: str) -> None:
    group = system / "cgroup" / folder
    group.mkdir(parents=True)
    (group / limit).write_text(f"{4 * 2**30}\n")
    (group / used).write_text(f"{3 * 2**30}\n")
    (group / "memory.stat").write_text(f"anon 17\n{files} {2**30}\n")
    assert free_bytes(torch.device("cpu")) == 2 * 2**30
    (group / limit).write_text("max\n")
    assert free_bytes(torch.device("cpu")) == 8 * 2**30


def test_other_devices_say_nothing() -> None:
    assert free_bytes(torch.device("meta")) is None
