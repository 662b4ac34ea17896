"""Attention patterns as text: one printable character for each value, or two where there is room.

A value `v` from 0 to 1 is written as the whole number nearest to `sqrt(v) * largest code`, since attention is mostly
small: near 0 neighbouring codes stand for values that lie close together.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ALPHABET = "".join(chr(code) for code in range(32, 127) if chr(code) not in '"\\<')
"""What stands in JSON within a script as itself."""


@dataclass(frozen=True)
class PatternCode:
    """A way to write values from 0 to 1.

    Attributes:
        width: characters of a value, 1 or 2.
    """

    width: int

    @property
    def largest(self) -> int:
        """The code of 1. One more stands for a value that is not a number."""
        return int(len(ALPHABET) ** self.width) - 2

    def largest_error(self, up_to: float = 1.0) -> float:
        """How far a written value can be from the true one, where that is at most `up_to`.

        Half a step `h` of the root moves `v` by at most `2 sqrt(v) h + h^2`.
        """
        half = 0.5 / self.largest
        return float(2 * up_to**0.5 * half + half**2)

    def write(self, values: Float[Tensor, " value"]) -> str:
        """The values as text, the larger digit of each first."""
        codes = (values.double().clamp(0.0, 1.0).sqrt() * self.largest).round()
        whole = codes.nan_to_num(self.largest + 1).to(torch.int64).numpy()
        digits = [whole // len(ALPHABET), whole % len(ALPHABET)] if self.width == 2 else [whole]
        letters = np.frombuffer(ALPHABET.encode("ascii"), dtype=np.uint8)
        written: bytes = letters[np.stack(digits, axis=-1)].tobytes()
        return written.decode("ascii")
