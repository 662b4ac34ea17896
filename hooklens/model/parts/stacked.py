"""Linear maps beside each other: in one parameter, or quantised each on its own."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class StackedLinear(nn.Module):
    """As many linear maps of one size as there are experts: what an `nn.Linear` holds, with a first axis for them.

    It holds the maps and does not apply them: which expert sees which token is its owner's to say.

    Args:
        n_maps: how many.
        into: size of what each reads.
        out_of: size of what each gives.
        bias: whether they have biases.
    """

    weight: Float[Tensor, "expert out_of into"]
    bias: Float[Tensor, "expert out_of"] | None

    def __init__(self, n_maps: int, into: int, out_of: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_maps, out_of, into))
        self.register_parameter("bias", nn.Parameter(torch.empty(n_maps, out_of)) if bias else None)

    def extra_repr(self) -> str:
        """The sizes, as `nn.Linear` shows its own."""
        n_maps, out_of, into = self.weight.shape
        return f"n_maps={n_maps}, into={into}, out_of={out_of}, bias={self.bias is not None}"


class QuantisedStack(nn.Module):
    """Quantised linear maps of one size, in the place of a `StackedLinear`: each a map of the library that reads it.

    Like that it holds the maps and does not apply them.

    Args:
        maps: the maps, without biases.

    Attributes:
        maps: the maps, in order.
        bias: of all of them.
    """

    maps: nn.ModuleList
    bias: Float[Tensor, "expert out_of"] | None

    def __init__(self, maps: Iterable[nn.Module]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(maps)
        self.register_parameter("bias", None)
