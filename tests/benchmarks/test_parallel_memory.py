"""What a process peaks at while it loads and runs its part of a network, to what one process does with all of it."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hooklens as hl
from hooklens.parallel import ParallelConfig, load
from tests.adapters.families.checks import save
from tests.parallel.launching import run_in_processes

# As many layers as networks have that one process cannot hold: weights in shares take some layers beside them. The
# rest of the network is small.
_SIZES = {
    "vocab_size": 1000,
    "hidden_size": 320,
    "num_hidden_layers": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1706,
    "max_position_embeddings": 256,
}


def _own_bytes() -> int:
    """Memory of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def measure(folder: str, config: dict[str, int]) -> int:
    """The peak over what the process had before, in bytes."""
    ids = torch.arange(64)[None].repeat(4, 1)
    # What is set up once, by whatever runs first.
    warm = hl.HookedCausalLM.from_pretrained("bundled:tiny-llama")
    warm(ids % 50)
    before, peak, done = _own_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _own_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        shared = config != {}
        # Converted: else the weights of the whole network would stay in the file that they are mapped from.
        options: Any = {"dtype": torch.float64}
        model: Any = (
            load(folder, ParallelConfig(**config), **options)
            if shared
            else hl.HookedCausalLM.from_pretrained(folder, **options)
        )
        with torch.no_grad():
            model(ids)
    finally:
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.parametrize("config", [{"tensor": 2}, {"pipeline": 2}, {"fully_sharded": 2}], ids=str)
def test_a_process_of_two_peaks_at(
    config: dict[str, int], tmp_path: Path, record_property: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is freed goes back to the system at once: else this counts what the C library keeps for later.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    save(tmp_path, "llama", **_SIZES)
    (alone,) = run_in_processes(1, measure, str(tmp_path), {})
    each = run_in_processes(2, measure, str(tmp_path), config)
    record_property("ratio", max(each) / alone)
    assert max(each) / alone < 0.75
