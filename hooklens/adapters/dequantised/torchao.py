"""What transformers saves of torchao's int8 weights: numbers, and scales and zero points for groups of inputs.

    weight[out, in] = scale[out, g(in)] (q[out, in] - zero[out, g(in)])

Groups are of equal size and in order; mostly a row is one.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from hooklens.adapters.dequantised.tensors import Parts
from hooklens.adapters.kept import QuantisedWeight, Rows, keep_int8
from hooklens.errors import CheckpointError


class TorchaoInt8:
    """int8 numbers with a scale for each group of inputs, and a zero point where they are not symmetric."""

    name = "torchao, 8 bits"
    markers = ("._weight_qdata",)
    plain = ".weight"
    parts: Mapping[str, str] = {"entries": "._weight_qdata", "scales": "._weight_scale"}
    extras: Mapping[str, str] = {"zeros": "._weight_zero_point"}
    ignored = ()
    dtype = torch.float32
    is_turned = False
    pads_biases = False

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """That of the entries."""
        shape, scales = parts.shape("entries"), parts.shape("scales")
        whole = len(shape) == len(scales) == 2 and scales[0] == shape[0] and scales[1] > 0 and not shape[1] % scales[1]
        if parts.dtype("entries") != "int8" or not whole:
            raise CheckpointError(
                f"is {parts.dtype('entries')} {list(shape)} with scales {list(scales)}; expected an int8 matrix and a "
                "number for each of its rows, or for each group of inputs in a row"
            )
        if "zeros" in parts and parts.shape("zeros") != scales:
            raise CheckpointError(f"its zero points are {list(parts.shape('zeros'))}, expected {list(scales)}")
        return shape

    def dequantise(self, parts: Parts) -> Tensor:
        """The weight, in float32."""
        size = parts.shape("entries")[1] // parts.shape("scales")[1]
        weight = parts.read("entries").to(torch.float32)
        if "zeros" in parts:
            weight -= _spread(parts.read("zeros"), size)
        weight *= _spread(parts.read("scales"), size)
        return weight

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Nothing: each row has scales of its own."""
        return None

    def keep(self, parts: Parts, rows: Rows) -> QuantisedWeight:
        """Rows as they are stored."""
        entries, scales = rows.take(parts.read("entries")), rows.take(parts.read("scales"))
        zeros = rows.take(parts.read("zeros")) if "zeros" in parts and bool(parts.read("zeros").any()) else None
        return keep_int8(entries, scales, zeros=zeros)


def _spread(numbers: Tensor, size: int) -> Tensor:
    """A number for each input, of one for each group of them."""
    wide = numbers.to(torch.float32)
    return wide if wide.shape[1] == 1 else wide.repeat_interleave(size, dim=1)
