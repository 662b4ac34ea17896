"""Arrays as JAX programs leave them, and the tensors of their numbers."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooklens.arguments import show

_FLOATS = ("float64", "float32", "float16")


def as_array(given: Any) -> Any:
    """A numpy array, where there is one in what was given: in a box (`flax.linen.Partitioned`), or on a device."""
    while not isinstance(given, np.ndarray | Tensor) and hasattr(given, "value"):
        given = given.value
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        return given.view(torch.uint16).numpy() if given.dtype == torch.bfloat16 else given.numpy()
    # Of lists and numbers numpy would make an array, too.
    return np.asarray(given) if hasattr(given, "__array__") else given


def dtype_problem(array: Any) -> str | None:
    """What is wrong with an array's numbers; None: nothing."""
    if not isinstance(array, np.ndarray):
        return show(array)
    return None if array.dtype.name in _FLOATS or _is_bfloat16(array) else f"{array.dtype}"


def _is_bfloat16(array: np.ndarray) -> bool:
    """Whether the entries are bfloat16, which numpy itself does not know.

    As JAX gives them (`ml_dtypes`), as `np.load` gives those back (two bytes without a meaning), or as the unsigned
    numbers of the same bits.
    """
    return array.dtype.name == "bfloat16" or array.dtype in (np.dtype("V2"), np.dtype(np.uint16))


def as_tensor(array: np.ndarray) -> Tensor:
    """The numbers of an array in memory of their own."""
    if _is_bfloat16(array):
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))
