"""The arguments `engine` and `workers` of public functions, and which models can go to other processes."""

from typing import Literal

import torch
from torch import nn

from hooklens.arguments import read_int, read_one_of
from hooklens.errors import InputError
from hooklens.hooks.call import thread_listeners
from hooklens.model.placement.shared_weights import refuse_shared

Engine = Literal["local", "ray"]
"""Where a call computes: in the process that calls, or in processes that Ray keeps."""

_DEVICES = ("cpu", "cuda")


def read_engine(engine: object, workers: object, *, what: str) -> tuple[Engine, int | None]:
    """What a caller gave as `engine` and `workers`.

    Raises:
        InputError: another engine, no number, or workers of the local engine.
    """
    read: Engine = read_one_of(engine, what=f"{what}: engine", options=("local", "ray"))
    if workers is None:
        return read, None
    number = read_int(workers, what=f"{what}: workers", least=1)
    if read == "local":
        raise InputError(
            f"{what}: workers is {number}, and engine='local' computes in this process; give engine='ray' with it, or "
            "leave it out"
        )
    return read, number


def check_portable(model: nn.Module, *, what: str) -> None:
    """Refuse a model of which other processes would compute something else than this one.

    Raises:
        InputError: processes share it, it lies on several devices or on one that workers do not have, hooks of a
            `with` block act on this thread, or autocast is on.
    """
    refuse_shared(model, f"{what}: engine='ray'", InputError)
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(devices) > 1 or torch.device(devices[0]).type not in _DEVICES:
        raise InputError(
            f"{what}: engine='ray' holds a copy of the model on each worker's CPU or GPU, and this model lies on "
            f"{', '.join(devices)}; move it to one device (a CPU or a CUDA device), or use engine='local'"
        )
    if thread_listeners():
        raise InputError(
            f"{what}: hooks of a `with model.hooks(...)` block act in this thread alone, not on Ray's workers; give "
            "edits=, or use engine='local'"
        )
    modes = [device for device in _DEVICES if torch.is_autocast_enabled(device)]
    if modes:
        raise InputError(
            f"{what}: autocast is on ({', '.join(modes)}), and holds in this process only; give a model in the dtype "
            "that it is to run in, or use engine='local'"
        )
