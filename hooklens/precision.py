"""The precision that sums are taken in: float32 for half-precision numbers, their own for all wider ones."""

import torch
from jaxtyping import Float
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for a narrower floating dtype, any other dtype itself."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def widen(tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The float32 copy of a tensor of narrower dtype, any other tensor itself."""
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
