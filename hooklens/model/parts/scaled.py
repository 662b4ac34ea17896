"""Linear maps of numbers of few bits, times scales: the weights of GPTQ, AWQ, fp8, compressed-tensors and MXFP4.

    weight[out, in] = scales[out, g(in)] (entries[out, in] - zeros[out, g(in)])

Groups of inputs share a scale. The weight is made at each call and let go after it, by the arithmetic with which a
checkpoint is dequantised: the map multiplies with those very numbers, to the bit, in any dtype and on any device.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

# Entries that are made together: temporary float32 tensors are as large as these.
_AT_ONCE = 2**22
# The values of the 4-bit floats E2M1 (Rouhani et al. 2023, "OCP Microscaling Formats (MX) Specification", 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _halves(entries: Tensor) -> Tensor:
    """The two numbers in each byte, the low half first."""
    return torch.stack((entries & 0xF, entries >> 4), dim=-1).flatten(-2)


def _widen_e2m1(entries: Tensor) -> Tensor:
    return torch.tensor(_E2M1, device=entries.device)[_halves(entries).int()]


KINDS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "uint4": lambda entries: _halves(entries).float(),
    "e2m1": _widen_e2m1,
    "int8": lambda entries: entries.float(),
    "uint8": lambda entries: entries.float(),
    "float8_e4m3fn": lambda entries: entries.view(torch.float8_e4m3fn).float(),
    "float8_e5m2": lambda entries: entries.view(torch.float8_e5m2).float(),
}
"""What numbers stored bytes are, in float32, by the name of their kind."""


class ScaledLinear(nn.Linear):
    """A linear map whose weight is numbers of few bits and scales.

    Args:
        kind: what the entries are, one of `KINDS`.
        entries: the bytes of each output's numbers; those of 4 bits two in one, the first in the low half.
        scales: of each output and group, in any floating dtype.
        d_in: number of inputs.
        zeros: what is subtracted from the numbers of a group, in any dtype; None: nothing.
        groups: the group of each input; None: groups are of one size, in order.
    """

    scales: Float[Tensor, "out_of group"]
    zeros: Tensor | None
    groups: Tensor | None

    def __init__(
        self,
        kind: str,
        entries: Tensor,
        scales: Tensor,
        d_in: int,
        *,
        zeros: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(d_in, len(entries), bias=False)
        self.kind = kind
        self.compute_dtype = torch.float32
        # A parameter, so that the map is where its weight is; of bytes, which no cast of a network changes.
        self.weight = nn.Parameter(entries, requires_grad=False)
        for name, tensor in (("scales", scales), ("zeros", zeros), ("groups", groups)):
            self.register_buffer(name, tensor)

    def dequantise(self, dtype: torch.dtype | None = None) -> Float[Tensor, "out_of into"]:
        """The weight, made in float32 and rounded once; None: to the dtype that is computed in."""
        made = torch.empty(
            self.out_features, self.in_features, dtype=dtype or self.compute_dtype, device=self.weight.device
        )
        step = max(_AT_ONCE // self.in_features, 1)
        for start in range(0, self.out_features, step):
            made[start : start + step] = self._make_rows(slice(start, start + step))
        return made

    def _make_rows(self, rows: slice) -> Float[Tensor, "row into"]:
        numbers, scales = KINDS[self.kind](self.weight[rows]), self.scales[rows].float()
        zeros = None if self.zeros is None else self.zeros[rows].float()
        if self.groups is None:
            grouped = numbers.view(len(numbers), scales.shape[1], -1)
            scales, zeros = scales[..., None], None if zeros is None else zeros[..., None]
        else:
            grouped = numbers
            scales, zeros = scales[:, self.groups], None if zeros is None else zeros[:, self.groups]
        if zeros is not None:
            grouped -= zeros
        grouped *= scales
        return numbers

    def forward(self, input: Float[Tensor, "*axes into"]) -> Float[Tensor, "*axes out_of"]:
        """`input W^T + b`."""
        if torch.is_grad_enabled() and input.requires_grad and not torch.compiler.is_compiling():
            made: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        else:
            made = F.linear(input, self.dequantise())
        return made if self.bias is None else made + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        """What `to(...)` and its like do: scales go where the network goes, in the dtype that they are stored in."""
        dtype = self.scales.dtype
        before = self.scales
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scales.dtype != dtype:
            self.scales = before.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        """What `nn.Linear` shows of itself, the kind of numbers and how many inputs share a scale."""
        shared = "in any order" if self.groups is not None else self.in_features // self.scales.shape[1]
        return f"{super().extra_repr()}, kind={self.kind}, group={shared}"


class _Product(torch.autograd.Function):
    """`x W^T`, of which no weight is kept for the way back: it is made once more."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, linear: ScaledLinear) -> Tensor:
        return F.linear(x, linear.dequantise())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ScaledLinear], output: Tensor) -> None:
        ctx.linear = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.linear.dequantise(gradient.dtype), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        tangent, _ = tangents
        assert tangent is not None
        return F.linear(tangent, ctx.linear.dequantise())
