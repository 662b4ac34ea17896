"""Functions that run in several processes at once, as `torchrun` would start them."""

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing
from torch.distributed.fsdp import FSDPModule

SHARES_WEIGHTS = hasattr(FSDPModule, "set_gradient_divide_factor")
"""Whether this PyTorch sums gradients of weights in shares; the oldest one that HookLens runs with averages them."""

# Processes are forked from one that has imported what they run, and where that cannot be, each imports it.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
# Pages of the documentation are run in copies of the same process, if they come later.
_IMPORTED = ["tests.documentation.preloaded", "tests.parallel.preloaded"]


def run_in_processes(n: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What a function gives in each of some processes that are joined by gloo.

    Args:
        n: how many.
        work: a function of a module, with the arguments.
        arguments: picklable.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(_IMPORTED)
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(_run, (n, port, folder, work, arguments), nprocs=n, start_method=_METHOD)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(n)]


def possible(configs: list[dict[str, int]]) -> list[dict[str, int]]:
    """Those of some ways of sharing that this PyTorch can do."""
    return [config for config in configs if SHARES_WEIGHTS or "fully_sharded" not in config]


def _run(rank: int, n: int, port: int, folder: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(n),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(n),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    given = work(*arguments)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(given))
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
