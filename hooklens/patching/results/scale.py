"""The scale from one unpatched run to the other, and where it is too short to divide by."""

from jaxtyping import Float
from torch import Tensor

SMALL = 0.05
"""A difference is small below this share of the root mean square over pairs."""


def find_small_differences(differences: Float[Tensor, " pairs"]) -> dict[int, float]:
    """The pairs whose two runs differ little against the spread over pairs, and by which share of it.

    The spread is the root mean square of the differences, so a single pair is never small, and equal runs have none.
    """
    wide = differences.detach().double()
    spread = float(wide.square().mean().sqrt())
    if not spread > 0:
        return {}
    shares = (wide.abs() / spread).tolist()
    return {pair: share for pair, share in enumerate(shares) if share < SMALL}
