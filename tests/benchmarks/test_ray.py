"""Recording on workers of Ray: throughput of two workers to that of one, each with one thread."""

import importlib.util
import os
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from hooklens.datasets import record as record_activations
from tests.benchmarks.test_recording import BATCH, ROW, make_network

if importlib.util.find_spec("ray") is None:
    pytest.skip("needs Ray: pip install 'hooklens[ray]'", allow_module_level=True)

import ray

N_TOKENS = int(os.environ.get("HOOKLENS_RAY_TOKENS", "500000"))
TURNS = 3


def test_two_workers_against_one(record: Any, tmp_path: Path) -> None:
    """Seconds of whole calls, the start of workers included, on a Ray that runs already; turns of both.

    The ratio without the start is that of the seconds that each call takes beyond one on a corpus of one batch.
    """
    torch.set_num_threads(1)
    # Else workers stand behind all other processes of the machine, this one included.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 -- as Ray spells it
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    model, site = make_network(), "blocks.11.hook_resid_post"
    rows = torch.randint(1000, (N_TOKENS // ROW, ROW), generator=torch.Generator().manual_seed(1))

    def run(documents: torch.Tensor, engine: dict[str, Any]) -> float:
        folder = tmp_path / "acts"
        begin = time.perf_counter()
        record_activations(
            model, documents, [site], folder, row_length=ROW, batch_tokens=BATCH, shard_bytes=2**23, progress=False,
            **engine,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        shutil.rmtree(folder)
        return seconds

    try:
        whole, beyond, one_to_local = [], [], []
        for turn in range(TURNS):
            kinds = [{"engine": "ray", "workers": 1}, {"engine": "ray", "workers": 2}]
            spent = {kind["workers"]: (run(rows[:16], kind), run(rows, kind)) for kind in kinds[:: (-1) ** turn]}
            local = run(rows, {})
            whole.append(spent[1][1] / spent[2][1])
            beyond.append((spent[1][1] - spent[1][0]) / (spent[2][1] - spent[2][0]))
            one_to_local.append(local / (spent[1][1] - spent[1][0]))
            print(f"{spent=} {local=} {os.getloadavg()=}")  # noqa: T201
    finally:
        ray.shutdown()
    record("recording on Ray: two workers / one, whole calls", median(whole), at_least=1.6)
    record("recording on Ray: two workers / one, without their start", median(beyond), at_least=1.6)
    record("recording on Ray: one worker without its start / the local engine", median(one_to_local), at_least=0.8)
