"""The states of all global random generators (torch's, numpy's, Python's), kept and put back."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

States = Mapping[str, Any]
"""The states of generators by library, as the libraries give them."""


def capture_random(*, devices: bool = True) -> States:
    """The states of the global generators.

    Args:
        devices: those of CUDA devices, too, where there are any in use.
    """
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state(legacy=False),
        "python": random.getstate(),
    }
    if devices and torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random(states: States) -> None:
    """Put captured states back."""
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])


def seed_random(seed: int) -> None:
    """Give all global generators one seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def keep_random(*, devices: bool = True) -> Iterator[None]:
    """Whatever draws random numbers in the block, the generators stand where they stood when it ends."""
    states = capture_random(devices=devices)
    try:
        yield
    finally:
        restore_random(states)


def states_to_plain(states: States) -> dict[str, Any]:
    """States as tensors, numbers, texts, and lists of them, which a file can hold."""
    return {"numpy": _arrays_to_tensors(states["numpy"]), **{name: states[name] for name in states if name != "numpy"}}


def states_from_plain(plain: Mapping[str, Any]) -> States:
    """States from what `states_to_plain` gave."""
    version, inner, gauss = plain["python"]
    return {**plain, "numpy": _tensors_to_arrays(plain["numpy"]), "python": (version, tuple(inner), gauss)}


def _arrays_to_tensors(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: _arrays_to_tensors(one) for name, one in given.items()}
    # Of unsigned numbers of 32 bits few versions of torch know more than the name.
    return torch.from_numpy(given.astype(np.int64)) if isinstance(given, np.ndarray) else given


def _tensors_to_arrays(given: Any) -> Any:
    if isinstance(given, Mapping):
        return {name: _tensors_to_arrays(one) for name, one in given.items()}
    return given.numpy().astype(np.uint32) if isinstance(given, Tensor) else given
