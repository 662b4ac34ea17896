"""An edit that exchanges what an activation holds of two directions."""

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from hooklens.errors import EditError
from hooklens.hooks.edits import Edit
from hooklens.hooks.region import Selection
from hooklens.precision import widen


@dataclass(frozen=True)
class SwapCoordinates(Edit):
    """Exchange the coordinates of the activation along two directions.

    The coordinates are those of least squares; what is orthogonal to both directions stays. Directions are taken at
    length 1.

    Attributes:
        directions: `[2 d]`.
    """

    directions: Tensor
    _: KW_ONLY

    def compute(self, region: Tensor, region_axes: tuple[str, ...], selection: Selection) -> Tensor:
        """The region with its coordinates exchanged.

        Raises:
            EditError: the directions are not two of the activation's width, or not independent.
        """
        given = self.directions
        if not isinstance(given, Tensor) or list(given.shape) != [2, region.shape[-1]]:
            found = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise EditError(f"{selection.subject}: directions are {found}; expected [2, {region.shape[-1]}]")
        rows = given.double()
        rows = rows / rows.norm(dim=-1, keepdim=True)
        # Twice 1 - |cosine|: below rounding the two are one direction, which has no second coordinate.
        if not bool(torch.linalg.svdvals(rows)[-1] > 1e-4):
            raise EditError(
                f"{selection.subject}: the two directions are zero or (nearly) one, so there is nothing to exchange"
            )
        wide = widen(region)
        basis, inverse = rows.to(wide), torch.linalg.pinv(rows).to(wide)
        coordinates = wide @ inverse
        swapped: Tensor = wide + (coordinates.flip(-1) - coordinates) @ basis
        return swapped.to(region.dtype)
