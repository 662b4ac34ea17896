"""Linear maps beside each other in one parameter."""

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
