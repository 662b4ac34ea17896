"""Tokens brought together by the expert that sees them, so that each expert is one matrix product.

The work grows with the pairs of a token and one of its experts, whatever the number of experts.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooklens.model.parts.quantised import dense_weight

# Rows of the fused kernel start at multiples of 16 bytes.
_ALIGNED = 8


class ExpertGroups:
    """Pairs of a token and an expert, sorted by expert; those of one expert in the order of the tokens.

    On a GPU that has torch's grouped matrix product for the dtype (bfloat16), nothing waits for the device. Elsewhere
    the number of pairs of each expert is read, once.

    An expert's pairs come from all rows of a batch. What a row gets depends on the other rows by rounding only: a
    product of more rows may sum in another order.

    Args:
        tokens: the token of each pair.
        experts: the expert of each pair.
        n_experts: how many there are.

    Attributes:
        tokens, experts: of the sorted pairs.
    """

    def __init__(self, tokens: Int[Tensor, " pair"], experts: Int[Tensor, " pair"], n_experts: int) -> None:
        self.experts, self._order = experts.sort(stable=True)
        self.tokens = tokens.index_select(0, self._order)
        numbers = torch.arange(n_experts, device=experts.device)
        self._ends = torch.searchsorted(self.experts, numbers, right=True, out_int32=True)
        # The experts that any token sees, with how many.
        self._seeing: list[tuple[int, int]] | None = None

    @classmethod
    def of_choice(cls, choice: Int[Tensor, "token choice"], n_experts: int) -> "ExpertGroups":
        """The pairs of each token and its experts, given as a table."""
        n_tokens, n_choices = choice.shape
        tokens = torch.arange(n_tokens, device=choice.device).repeat_interleave(n_choices, output_size=choice.numel())
        return cls(tokens, choice.flatten(), n_experts)

    def sort(self, pairs: Float[Tensor, "pair ..."]) -> Float[Tensor, "pair ..."]:
        """Pairs in the order of the experts, from the order that they were given in."""
        return pairs.index_select(0, self._order)

    def restore(self, pairs: Float[Tensor, "pair ..."]) -> Float[Tensor, "pair ..."]:
        """The inverse of `sort`."""
        return pairs.index_select(0, self._order.argsort())

    def apply(
        self,
        x: Float[Tensor, "pair into"],
        weight: Float[Tensor, "expert out_of into"],
        bias: Float[Tensor, "expert out_of"] | None,
    ) -> Float[Tensor, "pair out_of"]:
        """`x W_e^T + b_e`, with the map of each pair's expert."""
        if _is_fused(x, weight):
            made = F.grouped_mm(x, weight.mT, offs=self._ends)
        elif torch.compiler.is_compiling():
            made = torch.ops.hooklens.multiply_groups(x, weight, self._ends)
        else:
            made = self._apply_each(x, weight)
        return made if bias is None else made + bias.index_select(0, self.experts)

    def apply_each(
        self, x: Float[Tensor, "pair into"], maps: nn.ModuleList, bias: Float[Tensor, "expert out_of"] | None
    ) -> Float[Tensor, "pair out_of"]:
        """The same with a module for each expert's map; those that no token sees are not called."""
        # With no pairs at all, any map gives as many rows of the right size.
        parts = [maps[expert](part) for expert, part in self._split(x)] or [F.linear(x, dense_weight(maps[0]))]
        made = torch.cat(parts)
        return made if bias is None else made + bias.index_select(0, self.experts)

    def _apply_each(self, x: Tensor, weight: Tensor) -> Tensor:
        # One backward for all experts; indexed one by one, each would fill a gradient as large as all of them.
        maps = weight.unbind(0) if weight.requires_grad and torch.is_grad_enabled() else weight
        parts = [F.linear(part, maps[expert]) for expert, part in self._split(x)]
        return torch.cat(parts) if parts else F.linear(x, weight[0])

    def _split(self, x: Tensor) -> list[tuple[int, Tensor]]:
        """The experts that any token sees, each with its pairs."""
        if self._seeing is None:
            ends = self._ends.tolist()
            sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            self._seeing = [(expert, size) for expert, size in enumerate(sizes) if size]
        parts = torch.split(x, [size for _, size in self._seeing]) if self._seeing else ()
        return [(expert, part) for (expert, _), part in zip(self._seeing, parts, strict=True)]


def _is_fused(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a grouped matrix product for these, which casts nothing by itself."""
    return (
        x.is_cuda
        and x.dtype == weight.dtype == torch.bfloat16
        and not torch.is_autocast_enabled(x.device.type)
        and weight.shape[1] % _ALIGNED == 0
        and weight.shape[2] % _ALIGNED == 0
        and hasattr(F, "grouped_mm")
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )
