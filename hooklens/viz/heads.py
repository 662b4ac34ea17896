"""A value for each head: layers by heads."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from hooklens.arguments import reads
from hooklens.errors import InputError
from hooklens.viz.grid import Grid, grid
from hooklens.viz.scale import Scale


@reads()
def heads(
    values: Float[Tensor, "layer head"],
    *,
    layers: Sequence[int] | None = None,
    title: str = "heads",
    scale: Scale = "signed",
) -> Grid:
    """A value for each head of a network, such as a score, what patching it recovers, or what it adds to a logit.

    Args:
        values: `[layer head]`; NaN is a head that was not measured, or is not there.
        layers: the number of each layer; None counts from 0.
        title: what the values are.
        scale: `"signed"`: blue above 0 and orange below, as far to both sides; `"amount"`: from 0 to the largest.

    Raises:
        InputError: values of another shape, or layers that do not go with them.
    """
    if values.ndim != 2:
        raise InputError(f"heads: values have the shape {list(values.shape)}; expected [layer head]")
    return grid(
        values,
        rows="layer" if layers is None else ("layer", layers),
        columns="head",
        title=title,
        scale=scale,
    )
