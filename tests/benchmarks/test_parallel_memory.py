"""What a process peaks at while it loads and runs its part of a network, to what one process does with all of it."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import hooklens as hl
from hooklens.parallel import ParallelConfig, load
from tests.parallel.launching import run_in_processes

# 12 layers of 6.3 million weights, 302 MB in float32; the rest of the network is small beside them.
_CFG = {"d_model": 512, "n_layers": 12, "n_heads": 8, "d_vocab": 1000, "n_ctx": 256, "d_mlp": 2730}


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
        model: Any = load(folder, ParallelConfig(**config)) if shared else hl.HookedCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model(ids)
    finally:
        done.set()
        watcher.join()
    return peak - before


@pytest.mark.parametrize("config", [{"tensor": 2}, {"pipeline": 2}, {"fully_sharded": 2}], ids=str)
def test_a_process_of_two_peaks_at(config: dict[str, int], tmp_path: Path, record_property: Any) -> None:
    cfg = hl.HookedConfig(**_CFG)  # type: ignore[arg-type]
    model = hl.HookedCausalLM(cfg)
    model.initialize(seed=0)
    model.save_pretrained(tmp_path)
    del model
    (alone,) = run_in_processes(1, measure, str(tmp_path), {})
    each = run_in_processes(2, measure, str(tmp_path), config)
    record_property("ratio", max(each) / alone)
    assert max(each) / alone < 0.75
