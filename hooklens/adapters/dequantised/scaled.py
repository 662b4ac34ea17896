"""Weights of few bits in floating point, times scales: float8, int8, MXFP4.

    weight[i, j] = entry[i, j] scale[i // rows, j // columns]

for blocks of `rows` times `columns` entries (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.3); one row's
block is the whole row where scales are by output (`"channel"` in compressed-tensors).
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hooklens.adapters.dequantised.tensors import Parts
from hooklens.errors import CheckpointError

# Of activations and of the cache of keys and values, which are not quantised here.
_OF_ACTIVATIONS = (
    ".input_scale", ".activation_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
_ENTRIES = ("float8_e4m3fn", "float8_e5m2", "int8")
_SCALES = ("float64", "float32", "float16", "bfloat16", "float8_e8m0fnu")
# The values of the 4-bit floats E2M1 (Rouhani et al. 2023, "OCP Microscaling Formats (MX) Specification", 5.3.3).
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_E8M0_BIAS = 127


class Scaled:
    """Entries times scales, `<name>.weight` and a tensor beside it.

    Args:
        name: what the format is called.
        scale: the name of the scales.
        block: rows and columns that share a scale; None: one scale for all, or one for each row.
    """

    plain = ".weight"
    extras: ClassVar[Mapping[str, str]] = {"zero_point": ".weight_zero_point"}
    ignored = _OF_ACTIVATIONS
    dtype = torch.float32
    is_linear = True
    pads_biases = False

    def __init__(self, name: str, scale: str, block: tuple[int, int] | None) -> None:
        self.name, self.scale, self.block = name, scale, block

    @property
    def markers(self) -> tuple[str, ...]:
        """The scales tell."""
        return (f".{self.scale}",)

    @property
    def parts(self) -> Mapping[str, str]:
        """Entries and scales."""
        return {"entries": ".weight", "scale": f".{self.scale}"}

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """That of the entries."""
        shape, scales = parts.shape("entries"), parts.shape("scale")
        if parts.dtype("entries") not in _ENTRIES:
            raise CheckpointError(f"is {parts.dtype('entries')}; expected one of {', '.join(_ENTRIES)}")
        if parts.dtype("scale") not in _SCALES:
            raise CheckpointError(f"its {self.scale} is {parts.dtype('scale')}; expected one of {', '.join(_SCALES)}")
        if len(shape) != 2 or not all(shape):
            raise CheckpointError(f"is {list(shape)}; expected a matrix")
        expected = self._grid(shape)
        if math.prod(scales) != 1 and scales not in expected:
            listed = " or ".join(str(list(grid)) for grid in expected)
            raise CheckpointError(f"its {self.scale} is {list(scales)} for {list(shape)}; expected {listed}")
        if "zero_point" in parts and parts.shape("zero_point") != scales:
            raise CheckpointError(
                f"its weight_zero_point is {list(parts.shape('zero_point'))}; expected {list(scales)} as {self.scale}"
            )
        return shape

    def dequantise(self, parts: Parts) -> Tensor:
        """Entries times scales, in float32."""
        entries = parts.read("entries").to(torch.float32)
        if "zero_point" in parts:
            entries -= self._spread(parts.read("zero_point"), entries.shape)
        return entries.mul_(self._spread(parts.read("scale"), entries.shape))

    def _grid(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        rows, columns = shape
        if self.block is None:
            return ((rows, 1), (rows,))
        return ((math.ceil(rows / self.block[0]), math.ceil(columns / self.block[1])),)

    def _spread(self, scales: Tensor, shape: torch.Size) -> Tensor:
        """Scales with an entry for each weight's, or that broadcast to it."""
        scales = scales.to(torch.float32)
        if scales.numel() == 1:
            return scales.reshape(1, 1)
        if self.block is None:
            return scales.reshape(shape[0], 1)
        # The last blocks may be cut off.
        rows = scales.repeat_interleave(self.block[0], dim=0)[: shape[0]]
        return rows.repeat_interleave(self.block[1], dim=1)[:, : shape[1]]


class Mxfp4:
    """Experts of gpt-oss: 32 floats E2M1 share a scale that is a power of two; two lie in a byte, the low half first.

    `<name>_blocks` is `[experts, out, groups, 16]`, `<name>_scales` `[experts, out, groups]`, the exponent plus 127.
    The weight lies as `[experts, in, out]`. It is exact in bfloat16.
    """

    name = "mxfp4"
    markers = ("_blocks",)
    plain = ""
    parts: ClassVar[Mapping[str, str]] = {"blocks": "_blocks", "scales": "_scales"}
    extras: ClassVar[Mapping[str, str]] = {}
    ignored = ()
    dtype = torch.bfloat16
    is_linear = False
    pads_biases = False

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Experts, inputs, outputs."""
        blocks, scales = parts.shape("blocks"), parts.shape("scales")
        dtypes = {parts.dtype("blocks"), parts.dtype("scales")}
        if len(blocks) != 4 or blocks[:-1] != scales or dtypes != {"uint8"}:
            raise CheckpointError(
                f"its blocks are {list(blocks)} and its scales {list(scales)}, {' and '.join(sorted(dtypes))}; "
                "expected [experts, out, groups, bytes] and [experts, out, groups], uint8"
            )
        n_experts, d_out, n_groups, n_bytes = blocks
        return (n_experts, n_groups * n_bytes * 2, d_out)

    def dequantise(self, parts: Parts) -> Tensor:
        """The experts, one after another."""
        blocks, scales = parts.read("blocks"), parts.read("scales")
        n_experts, d_in, d_out = self.shape(parts)
        weight = torch.empty(n_experts, d_out, d_in, dtype=self.dtype)
        values = torch.tensor(_E2M1)
        for expert in range(n_experts):
            halves = torch.stack((blocks[expert] & 0xF, blocks[expert] >> 4), dim=-1)
            exponents = scales[expert].to(torch.int32) - _E8M0_BIAS
            weight[expert] = torch.ldexp(values[halves.int()].flatten(-2), exponents[..., None]).flatten(-2)
        return weight.transpose(1, 2)
