"""Recording on workers of Ray: throughput of two workers to that of one, each with one thread."""

import importlib.util
import multiprocessing
import os
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from hooklens import HookedCausalLM
from hooklens.datasets import record as record_activations
from tests.benchmarks.test_recording import BATCH, ROW, make_network

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'hooklens[ray]'", allow_module_level=True)

import ray

N_TOKENS = int(os.environ.get("HOOKLENS_RAY_TOKENS", "500000"))
TURNS = 3
SITE = "blocks.11.hook_resid_post"


def draw_rows() -> torch.Tensor:
    return torch.randint(1000, (N_TOKENS // ROW, ROW), generator=torch.Generator().manual_seed(1))


def record_rows(rows: torch.Tensor, folder: Path, engine: dict[str, Any], model: HookedCausalLM) -> float:
    """Seconds of a recording, which is thrown away."""
    begin = time.perf_counter()
    record_activations(
        model, rows, [SITE], folder, row_length=ROW, batch_tokens=BATCH, shard_bytes=2**23, progress=False, **engine
    )
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder)
    return seconds


def record_beside(folder: Path, barrier: Any, found: Any) -> None:
    """Record on the local engine in a process of its own, when all others are ready, too."""
    torch.set_num_threads(1)
    model, rows = make_network(), draw_rows()
    record_rows(rows[:16], folder, {}, model)
    barrier.wait()
    found.put(record_rows(rows, folder, {}, model))


def seconds_of_processes(number: int, folder: Path) -> float:
    """Seconds that each of some processes takes for a recording of its own, with nothing in common but the machine."""
    context = multiprocessing.get_context("spawn")
    barrier, found = context.Barrier(number), context.Queue()
    processes = [
        context.Process(target=record_beside, args=(folder / str(place), barrier, found)) for place in range(number)
    ]
    for process in processes:
        process.start()
    seconds = [found.get() for _ in processes]
    for process in processes:
        process.join()
    return max(seconds)


def test_two_workers_against_one(record: Any, tmp_path: Path) -> None:
    """Seconds of whole calls, the start of workers included, on a Ray that runs already; turns of both.

    The ratio without the start is that of the seconds that each call takes beyond one on a corpus of one batch. What
    two processes could reach on this machine is measured with two that do not know of each other, in the same turns.
    """
    torch.set_num_threads(1)
    # Else workers stand behind all other processes of the machine, this one included.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- as Ray spells it
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    model, rows = make_network(), draw_rows()

    def run(documents: torch.Tensor, engine: dict[str, Any]) -> float:
        return record_rows(documents, tmp_path / "acts", engine, model)

    try:
        whole, beyond, one_to_local, possible = [], [], [], []
        for turn in range(TURNS):
            kinds = [{"engine": "ray", "workers": 1}, {"engine": "ray", "workers": 2}]
            spent = {kind["workers"]: (run(rows[:16], kind), run(rows, kind)) for kind in kinds[:: (-1) ** turn]}
            local = run(rows, {})
            whole.append(spent[1][1] / spent[2][1])
            beyond.append((spent[1][1] - spent[1][0]) / (spent[2][1] - spent[2][0]))
            one_to_local.append(local / (spent[1][1] - spent[1][0]))
            beside = {number: seconds_of_processes(number, tmp_path) for number in (1, 2)}
            possible.append(2 * beside[1] / beside[2])
            print(f"{spent=} {local=} {beside=} {os.getloadavg()=}")  # noqa: T201
    finally:
        ray.shutdown()
    record("recording: two processes on their own / one: what the machine allows", median(possible))
    record("recording on Ray: two workers / one, whole calls", median(whole), at_least=1.6)
    record("recording on Ray: two workers / one, without their start", median(beyond), at_least=1.6)
    record("recording on Ray: one worker without its start / the local engine", median(one_to_local), at_least=0.8)
