"""Tensors of libraries that quantise: few bits for each number, and scales, in a class of their own."""

from torch import Tensor, nn

TORCHAO, BITSANDBYTES = "torchao", "bitsandbytes"
_PLAIN = (Tensor, nn.Parameter)


def is_quantised_tensor(tensor: object) -> bool:
    """Whether a tensor is a quantised weight, of torchao or bitsandbytes."""
    return type(tensor) not in _PLAIN and package_of(tensor) in (TORCHAO, BITSANDBYTES)


def package_of(value: object) -> str:
    """The package that the class of a value comes from."""
    return type(value).__module__.partition(".")[0]
