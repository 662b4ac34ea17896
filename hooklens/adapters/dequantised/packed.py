"""Weights of few bits as integers, several in an int32, with a scale and a zero point for groups of inputs.

    weight[out, in] = scales[g(in), out] (q[in, out] - zero[g(in), out])

GPTQ (Frantar et al. 2022) packs along the inputs, and zero points along the outputs, the first in the lowest bits. AWQ
(Lin et al. 2023; AutoAWQ's `GEMM` version) packs both along the outputs, eight in the order 0, 2, 4, 6, 1, 3, 5, 7.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hooklens.adapters.dequantised.tensors import Parts
from hooklens.errors import CheckpointError

_WORD = 32
# Entries that are unpacked together: temporary tensors are as large as these.
_AT_ONCE = 2**18
# Which of eight columns lies in the i-th four bits.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Words as the numbers in them, the lowest bits first, along a new last axis."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return torch.bitwise_and(torch.bitwise_right_shift(words[..., None], shifts), 2**bits - 1)


def _unpack_columns(words: Tensor, bits: int) -> Tensor:
    return _unpack(words, bits).flatten(-2)


def _dequantise(read: Callable[[slice], Tensor], zeros: Tensor, scales: Tensor, groups: Tensor) -> Tensor:
    """The weight `[out, in]`, in float32; every step is exact but the last product's rounding.

    Args:
        read: gives the numbers `[in, some out]` of some outputs, which begin at a whole word.
        zeros, scales: `[groups, out]`.
        groups: of each input.
    """
    d_in, d_out = len(groups), scales.shape[1]
    weight = torch.empty(d_in, d_out)
    step = max(_AT_ONCE // d_in // _WORD, 1) * _WORD
    for start in range(0, d_out, step):
        place = slice(start, min(start + step, d_out))
        part = read(place).to(torch.float32)
        part -= zeros[:, place].to(torch.float32)[groups]
        part *= scales[:, place].to(torch.float32)[groups]
        weight[:, place] = part
    return weight.T


def _check(parts: Parts, expected: Mapping[str, tuple[int, ...]], integers: tuple[str, ...]) -> None:
    wrong = [
        f"its {role} is {list(parts.shape(role))}, expected {list(shape)}"
        for role, shape in expected.items()
        if parts.shape(role) != shape
    ]
    wrong += [f"its {role} is {parts.dtype(role)}, expected int32" for role in integers if parts.dtype(role) != "int32"]
    if wrong:
        raise CheckpointError("; ".join(wrong))


def _group_of(n_inputs: int, group_size: int) -> int:
    return n_inputs if group_size == -1 else group_size


class Gptq:
    """GPTQ's layout: `qweight [in / k, out]`, `qzeros [groups, out / k]`, `scales [groups, out]`, `g_idx [in]`.

    A word holds `k = 32 / bits` numbers. `g_idx` is the group of each input, which are in order where it is absent.

    Args:
        bits: of a number.
        group_size: inputs that share a scale; -1: all.
        zeros_less_one: zero points are stored less one, as the first version of the format does. It wraps around.
    """

    name = "gptq"
    markers = (".qweight",)
    plain = ".weight"
    parts: ClassVar[Mapping[str, str]] = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
    extras: ClassVar[Mapping[str, str]] = {"g_idx": ".g_idx"}
    ignored = ()
    dtype = torch.float32
    is_linear = True
    pads_biases = True

    def __init__(self, bits: int, group_size: int, *, zeros_less_one: bool = True) -> None:
        self.bits, self.group_size, self.zeros_less_one = bits, group_size, zeros_less_one

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Outputs, inputs."""
        if len(parts.shape("qweight")) != 2 or len(parts.shape("scales")) != 2:
            raise CheckpointError("its qweight or scales is no matrix")
        per_word = _WORD // self.bits
        n_words, d_out = parts.shape("qweight")
        d_in = n_words * per_word
        n_groups = -(-d_in // _group_of(d_in, self.group_size))
        expected: dict[str, tuple[int, ...]] = {
            "qzeros": (n_groups, -(-d_out // per_word)),
            "scales": (n_groups, d_out),
        }
        if "g_idx" in parts:
            expected["g_idx"] = (d_in,)
        _check(parts, expected, ("qweight", "qzeros"))
        return (d_out, d_in)

    def dequantise(self, parts: Parts) -> Tensor:
        """The weight, in float32."""
        d_out, d_in = self.shape(parts)
        scales = parts.read("scales")
        words = parts.read("qweight")

        def read(place: slice) -> Tensor:
            return _unpack(words[:, place], self.bits).transpose(1, 2).reshape(d_in, -1)

        zeros = _unpack_columns(parts.read("qzeros"), self.bits)[:, :d_out]
        if self.zeros_less_one:
            zeros = (zeros + 1) & (2**self.bits - 1)
        if "g_idx" in parts:
            groups = parts.read("g_idx").long()
            if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < len(scales):
                raise CheckpointError(
                    f"g_idx of a quantised weight names groups from {int(groups.min())} to {int(groups.max())}; there "
                    f"are {len(scales)}. The file is damaged: download it again"
                )
        else:
            groups = torch.arange(d_in) // _group_of(d_in, self.group_size)
        return _dequantise(read, zeros, scales, groups)


class Awq:
    """AutoAWQ's `GEMM` layout, of 4 bits: `qweight [in, out / 8]`, `qzeros [groups, out / 8]`, `scales [groups, out]`.

    Args:
        group_size: inputs that share a scale; -1: all.
    """

    name = "awq"
    markers = (".qweight",)
    plain = ".weight"
    parts: ClassVar[Mapping[str, str]] = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
    extras: ClassVar[Mapping[str, str]] = {}
    ignored = ()
    dtype = torch.float32
    is_linear = True
    pads_biases = False

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """Outputs, inputs."""
        if len(parts.shape("qweight")) != 2:
            raise CheckpointError("its qweight is no matrix")
        d_in, n_words = parts.shape("qweight")
        d_out = n_words * len(_AWQ_ORDER)
        n_groups = -(-d_in // _group_of(d_in, self.group_size))
        _check(parts, {"qzeros": (n_groups, n_words), "scales": (n_groups, d_out)}, ("qweight", "qzeros"))
        return (d_out, d_in)

    def dequantise(self, parts: Parts) -> Tensor:
        """The weight, in float32."""
        _, d_in = self.shape(parts)
        words, zeros = parts.read("qweight"), self._unpack(parts.read("qzeros"))

        def read(place: slice) -> Tensor:
            per_word = len(_AWQ_ORDER)
            return self._unpack(words[:, place.start // per_word : place.stop // per_word])

        groups = torch.arange(d_in) // _group_of(d_in, self.group_size)
        return _dequantise(read, zeros, parts.read("scales"), groups)

    @staticmethod
    def _unpack(words: Tensor) -> Tensor:
        numbers = _unpack(words, 4)
        columns = torch.empty_like(numbers)
        columns[..., list(_AWQ_ORDER)] = numbers
        return columns.flatten(-2)
