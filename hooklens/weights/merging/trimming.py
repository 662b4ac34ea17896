"""The largest entries of many tensors together, exactly, without all of them in memory at once.

Sizes of entries are ordered as the bits of non-negative float64 numbers are, read as whole numbers (IEEE 754). Several
looks at all tensors find the size of the last entry that stays: each counts the entries by the next 16 bits of those
whose leading bits are known.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

N_LOOKS = 4
"""How often all tensors are looked at, at most."""

_DIGITS, _DIGIT = N_LOOKS, 16
_VALUES = 1 << _DIGIT


@dataclass
class Trim:
    """Keeps the largest entries of tensors that come one after another, always in the same order.

    Attributes:
        size: of the smallest entry that stays.
        n_at_size: how many of the entries of just that size stay: the first ones.
    """

    size: float
    n_at_size: int
    _left: int = field(init=False)

    def __post_init__(self) -> None:
        self._left = self.n_at_size

    def __call__(self, tensor: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The next tensor, with 0 for all entries that do not stay."""
        return torch.where(self.keep(tensor), tensor, 0.0)

    def keep(self, tensor: Float[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Which entries of the next tensor stay."""
        sizes = tensor.abs()
        larger, at_size = sizes > self.size, sizes == self.size
        n_at_size = int(at_size.sum())
        if n_at_size > self._left:
            at_size &= (at_size.flatten().cumsum(0) <= self._left).view_as(at_size)
        self._left -= min(n_at_size, self._left)
        return larger | at_size


def find_trim(tensors: Callable[[], Iterable[Float[Tensor, "..."]]], n_kept: int) -> Trim:
    """What keeps the `n_kept` largest entries in absolute value; of equal ones, the first.

    Args:
        tensors: gives all tensors, as float64, each time that it is called.
        n_kept: from 0 to their number of entries.
    """
    if n_kept == 0:
        return Trim(float("inf"), 0)
    leading, n_larger = 0, 0
    for digit in reversed(range(_DIGITS)):
        counts = torch.zeros(_VALUES, dtype=torch.long)
        for tensor in tensors():
            bits = tensor.abs().contiguous().view(torch.int64).flatten()
            if digit < _DIGITS - 1:
                bits = bits[bits >> (_DIGIT * (digit + 1)) == leading]
            counts += torch.bincount((bits >> (_DIGIT * digit)) & (_VALUES - 1), minlength=_VALUES).cpu()
        # How many entries have this digit or a larger one.
        at_least = counts.flip(0).cumsum(0).flip(0)
        found = int((at_least >= n_kept - n_larger).nonzero().max())
        n_larger += int(at_least[found] - counts[found])
        leading = (leading << _DIGIT) | found
    size = torch.tensor(leading, dtype=torch.int64).view(torch.float64)
    return Trim(float(size), n_kept - n_larger)
