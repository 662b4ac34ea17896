"""Weights of few bits in floating point, times scales: float8, int8, MXFP4.

    weight[i, j] = entry[i, j] scale[i // rows, j // columns]

for blocks of `rows` times `columns` entries (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.3); one row's
block is the whole row where scales are by output (`"channel"` in compressed-tensors).
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hooklens.adapters.dequantised.packed import OF_ACTIVATIONS
from hooklens.adapters.dequantised.tensors import Parts
from hooklens.adapters.kept import QuantisedWeight, Rows, keep_int8, keep_scaled
from hooklens.errors import CheckpointError

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
    extras: Mapping[str, str] = {"zero_point": ".weight_zero_point"}
    ignored = OF_ACTIVATIONS
    dtype = torch.float32
    is_turned = False
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

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Nothing: rows take their scales along."""
        return None

    def keep(self, parts: Parts, rows: Rows) -> QuantisedWeight:
        """Rows as they are stored, each with scales of its own."""
        entries = parts.read("entries")
        shape, dtype = entries.shape, str(entries.dtype).removeprefix("torch.")
        entries = rows.take(entries.view(torch.uint8) if dtype.startswith("float8") else entries)
        scales, zeros = self._by_row(parts.read("scale"), shape, rows), None
        if "zero_point" in parts:
            zeros = self._by_row(parts.read("zero_point"), shape, rows)
        size = shape[1] if self.block is None or scales.shape[1] == 1 else self.block[1]
        groups = torch.arange(shape[1]) // size if shape[1] % size else None
        if dtype == "int8":
            return keep_int8(entries, scales, zeros=zeros, groups=groups)
        return keep_scaled(dtype, entries, scales, shape[1], zeros=zeros, groups=groups)

    def _by_row(self, scales: Tensor, shape: torch.Size, rows: Rows) -> Tensor:
        """Scales, or zero points, of each row's groups of inputs."""
        if scales.dtype.itemsize == 8 or "e8m0" in str(scales.dtype):
            scales = scales.to(torch.float32)
        if scales.numel() == 1:
            return scales.reshape(1, 1).expand(len(rows.numbers), 1)
        if self.block is None:
            return rows.take(scales.reshape(shape[0], 1))
        return scales.index_select(0, rows.numbers // self.block[0])

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
    The plain weight lies as `[experts, in, out]`. It is exact in bfloat16.
    """

    name = "mxfp4"
    markers = ("_blocks",)
    plain = ""
    parts: Mapping[str, str] = {"blocks": "_blocks", "scales": "_scales"}
    extras: Mapping[str, str] = {}
    ignored = ()
    dtype = torch.bfloat16
    is_turned = True
    pads_biases = False

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Experts, outputs, inputs."""
        blocks, scales = parts.shape("blocks"), parts.shape("scales")
        dtypes = {parts.dtype("blocks"), parts.dtype("scales")}
        if len(blocks) != 4 or blocks[:-1] != scales or dtypes != {"uint8"}:
            raise CheckpointError(
                f"its blocks are {list(blocks)} and its scales {list(scales)}, {' and '.join(sorted(dtypes))}; "
                "expected [experts, out, groups, bytes] and [experts, out, groups], uint8"
            )
        n_experts, d_out, n_groups, n_bytes = blocks
        return (n_experts, d_out, n_groups * n_bytes * 2)

    def dequantise(self, parts: Parts) -> Tensor:
        """The experts, one after another."""
        blocks, scales = parts.read("blocks"), parts.read("scales")
        n_experts, d_out, d_in = self.shape(parts)
        weight = torch.empty(n_experts, d_out, d_in, dtype=self.dtype)
        values = torch.tensor(_E2M1)
        for expert in range(n_experts):
            halves = torch.stack((blocks[expert] & 0xF, blocks[expert] >> 4), dim=-1)
            exponents = scales[expert].to(torch.int32) - _E8M0_BIAS
            weight[expert] = torch.ldexp(values[halves.int()].flatten(-2), exponents[..., None]).flatten(-2)
        return weight

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Nothing: each row has scales of its own."""
        return None

    def keep(self, parts: Parts, rows: Rows) -> tuple[QuantisedWeight, ...]:
        """Rows of each expert as they are stored, the scales as the powers of two that they are."""
        blocks, exponents = parts.read("blocks"), parts.read("scales").to(torch.int32) - _E8M0_BIAS
        # Which bfloat16 holds, all but 2^128.
        scales = torch.ldexp(torch.ones(exponents.shape), exponents).to(torch.bfloat16)
        d_in = self.shape(parts)[-1]
        return tuple(
            keep_scaled("e2m1", rows.take(numbers.flatten(1)), rows.take(own), d_in)
            for numbers, own in zip(blocks, scales, strict=True)
        )
