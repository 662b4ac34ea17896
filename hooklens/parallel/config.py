"""How a network is spread over processes."""

import os
from dataclasses import dataclass
from functools import partial

import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hooklens.arguments import read_int
from hooklens.errors import ConfigError, InputError

AXES = ("pipeline", "data", "fully_sharded", "tensor")
"""The axes of the mesh of processes, neighbours along the last one nearest to each other."""

_read_size = partial(read_int, least=1, error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many processes share what; their product is how many `torchrun` starts.

    Attributes:
        tensor: processes that share the heads of attention and the neurons of MLPs of every layer.
        pipeline: processes that have some of the layers each.
        data: processes that have all weights and some rows of a batch each.
        fully_sharded: processes that have some rows of a batch each and a share of every weight, put together for the
            time that a layer runs.

    Raises:
        ConfigError: a size that is no positive number.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    fully_sharded: int = 1

    def __post_init__(self) -> None:
        for name in AXES:
            _read_size(getattr(self, name), what=f"ParallelConfig: {name}")

    @property
    def n_processes(self) -> int:
        """How many processes there are in all."""
        return self.tensor * self.pipeline * self.data * self.fully_sharded

    @property
    def n_row_parts(self) -> int:
        """Into how many parts the rows of a batch are taken apart."""
        return self.data * self.fully_sharded


def make_mesh(config: ParallelConfig) -> DeviceMesh:
    """The mesh of processes that `torchrun` started; joins them where that has not happened yet.

    They talk through NCCL where each has an accelerator of its own, else through gloo.

    Raises:
        InputError: this process was started by itself, or there are more or fewer than the config says.
    """
    if not distributed.is_initialized():
        if config.n_processes == 1 and "RANK" not in os.environ:
            # A process by itself needs nobody to tell it of the others.
            distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
            return make_mesh(config)
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise InputError(
                "parallel: this process was not started by torchrun, so there is nobody to share the network with; "
                f"start the script with `torchrun --nproc-per-node={config.n_processes} script.py`"
            )
        device = own_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    n_started = distributed.get_world_size()
    if n_started != config.n_processes:
        raise InputError(
            f"parallel: {n_started} processes were started, and {config} takes {config.n_processes}, the product of "
            "its sizes; start as many, or change the config"
        )
    sizes = tuple(getattr(config, name) for name in AXES)
    return init_device_mesh(own_device().type, sizes, mesh_dim_names=AXES)


def own_device() -> torch.device:
    """Where this process computes: on its own accelerator where there is one for each, else on the CPU."""
    if distributed.is_initialized() and distributed.get_backend() == "gloo":
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    n_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and torch.cuda.device_count() >= n_local:
        return torch.device("cuda", local)
    return torch.device("cpu")
