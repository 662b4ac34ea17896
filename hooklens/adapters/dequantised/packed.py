"""Weights of few bits as integers, several in an int32, with a scale and a zero point for groups of inputs.

    weight[out, in] = scales[g(in), out] (q[in, out] - zero[g(in), out])

GPTQ (Frantar et al. 2022) packs along the inputs, and zero points along the outputs, the first in the lowest bits. AWQ
(Lin et al. 2023; AutoAWQ's `GEMM` version) packs both along the outputs, eight in the order 0, 2, 4, 6, 1, 3, 5, 7.
compressed-tensors (`pack-quantized`) packs rows along their inputs, and zero points along the outputs.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from hooklens.adapters.dequantised.tensors import Parts
from hooklens.adapters.kept import QuantisedWeight, Rows, keep_scaled
from hooklens.errors import CheckpointError

# Scales of activations and of the cache of keys and values, which are not quantised here.
OF_ACTIVATIONS = (
    ".input_scale", ".activation_scale", ".input_zero_point", ".output_scale", ".k_scale", ".v_scale", ".q_scale",
)  # fmt: skip
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
    for place in _some_at_once(d_in, d_out):
        part = read(place).to(torch.float32)
        part -= zeros[:, place].to(torch.float32)[groups]
        part *= scales[:, place].to(torch.float32)[groups]
        weight[:, place] = part
    return weight.T


def _some_at_once(d_in: int, d_out: int) -> Iterator[slice]:
    """All outputs, so many of them together that each part begins at a whole word."""
    step = max(_AT_ONCE // d_in // _WORD, 1) * _WORD
    for start in range(0, d_out, step):
        yield slice(start, min(start + step, d_out))


def _keep(kind: str, rows: Rows, entries: Tensor, zeros: Tensor, scales: Tensor, groups: Tensor) -> QuantisedWeight:
    """Rows of numbers, with those of zero points and scales `[groups, out]`."""
    d_in = len(groups)
    in_order = d_in % len(scales) == 0 and torch.equal(groups, torch.arange(d_in) // (d_in // len(scales)))
    return keep_scaled(
        kind,
        entries,
        rows.take(scales, dim=1).T,
        d_in,
        zeros=rows.take(zeros, dim=1).T.to(torch.uint8),
        groups=None if in_order else groups,
    )


def _check(parts: Parts, expected: Mapping[str, tuple[int, ...]], integers: tuple[str, ...]) -> None:
    wrong = [
        f"its {role} is {list(parts.shape(role))}, expected {list(shape)}"
        for role, shape in expected.items()
        if parts.shape(role) != shape
    ]
    wrong += [f"its {role} is {parts.dtype(role)}, expected int32" for role in integers if parts.dtype(role) != "int32"]
    if wrong:
        raise CheckpointError("; ".join(wrong))


def _read_groups(parts: Parts, d_in: int, group_size: int, n_groups: int) -> Tensor:
    """The group of each input."""
    if "g_idx" not in parts:
        return torch.arange(d_in) // _group_of(d_in, group_size)
    groups = parts.read("g_idx").long()
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < n_groups:
        raise CheckpointError(
            f"g_idx of a quantised weight names groups from {int(groups.min())} to {int(groups.max())}; there "
            f"are {n_groups}. The file is damaged: download it again"
        )
    return groups


def _why_odd(d_in: int) -> str | None:
    return f"its {d_in} inputs are an odd number, and two of them would share a byte" if d_in % 2 else None


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
    parts: Mapping[str, str] = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
    extras: Mapping[str, str] = {"g_idx": ".g_idx"}
    ignored = ()
    dtype = torch.float32
    is_turned = False
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
        d_in = self.shape(parts)[1]
        words = parts.read("qweight")

        def read(place: slice) -> Tensor:
            return _unpack(words[:, place], self.bits).transpose(1, 2).reshape(d_in, -1)

        return _dequantise(read, self._read_zeros(parts), parts.read("scales"), self._read_groups(parts))

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Nothing: a row's words hold no others' numbers."""
        return None

    def keep(self, parts: Parts, rows: Rows) -> QuantisedWeight:
        """Rows as they are stored, but one after another: the bytes of a row's words are its numbers, in order."""
        words = rows.take(parts.read("qweight"), dim=1).T.contiguous()
        entries, zeros = _unpack_columns(words, 8).to(torch.uint8), self._read_zeros(parts)
        return _keep(f"uint{self.bits}", rows, entries, zeros, parts.read("scales"), self._read_groups(parts))

    def _read_zeros(self, parts: Parts) -> Tensor:
        zeros = _unpack_columns(parts.read("qzeros"), self.bits)[:, : parts.shape("scales")[1]]
        return (zeros + 1) & (2**self.bits - 1) if self.zeros_less_one else zeros

    def _read_groups(self, parts: Parts) -> Tensor:
        return _read_groups(parts, self.shape(parts)[1], self.group_size, parts.shape("scales")[0])


class Awq:
    """AutoAWQ's `GEMM` layout, of 4 bits: `qweight [in, out / 8]`, `qzeros [groups, out / 8]`, `scales [groups, out]`.

    Args:
        group_size: inputs that share a scale; -1: all.
    """

    name = "awq"
    markers = (".qweight",)
    plain = ".weight"
    parts: Mapping[str, str] = {"qweight": ".qweight", "qzeros": ".qzeros", "scales": ".scales"}
    extras: Mapping[str, str] = {}
    ignored = ()
    dtype = torch.float32
    is_turned = False
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
        zeros = self._unpack(parts.read("qzeros"))
        return _dequantise(self._reader(parts), zeros, parts.read("scales"), self._groups(parts))

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Two numbers of a row are to lie in a byte."""
        return _why_odd(self.shape(parts)[1])

    def keep(self, parts: Parts, rows: Rows) -> QuantisedWeight:
        """Rows as they are stored, but packed along themselves: words hold numbers of eight of them."""
        d_out, d_in = self.shape(parts)
        read, entries = self._reader(parts), torch.empty(d_out, d_in // 2, dtype=torch.uint8)
        for place in _some_at_once(d_in, d_out):
            first, second = read(place).view(-1, 2, place.stop - place.start).permute(1, 2, 0)
            entries[place] = first | second << 4
        zeros = self._unpack(parts.read("qzeros"))
        return _keep("uint4", rows, rows.take(entries), zeros, parts.read("scales"), self._groups(parts))

    def _reader(self, parts: Parts) -> Callable[[slice], Tensor]:
        words, per_word = parts.read("qweight"), len(_AWQ_ORDER)
        return lambda place: self._unpack(words[:, place.start // per_word : place.stop // per_word])

    def _groups(self, parts: Parts) -> Tensor:
        d_in = self.shape(parts)[1]
        return torch.arange(d_in) // _group_of(d_in, self.group_size)

    @staticmethod
    def _unpack(words: Tensor) -> Tensor:
        numbers = _unpack(words, 4)
        columns = torch.empty_like(numbers)
        columns[..., list(_AWQ_ORDER)] = numbers
        return columns.flatten(-2)


class CompressedPacked:
    """compressed-tensors' `pack-quantized` layout: `weight_packed [out, in / k]`, `weight_scale [out, groups]`.

    A word holds `k = 32 / bits` numbers. `weight_zero_point [out / k, groups]` is absent where numbers lie around the
    middle of their range; `weight_shape` is outputs and inputs, `weight_g_idx [in]` the group of each input.

    Args:
        bits: of a number.
        group_size: inputs that share a scale; -1: all.
        has_zeros: every weight has zero points; else those that have.
    """

    name = "compressed-tensors, packed"
    markers = (".weight_packed",)
    plain = ".weight"
    extras: Mapping[str, str] = {"zeros": ".weight_zero_point", "g_idx": ".weight_g_idx"}
    ignored = OF_ACTIVATIONS
    dtype = torch.float32
    is_turned = False
    pads_biases = False

    def __init__(self, bits: int, group_size: int, *, has_zeros: bool = False) -> None:
        self.bits, self.group_size, self.has_zeros = bits, group_size, has_zeros

    @property
    def parts(self) -> Mapping[str, str]:
        """Numbers, scales, the shape, and zero points where all have them."""
        needed = {"packed": ".weight_packed", "scales": ".weight_scale", "shape": ".weight_shape"}
        return needed | {"zeros": self.extras["zeros"]} if self.has_zeros else needed

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """What `weight_shape` says, held against the sizes of the tensors."""
        said = parts.read("shape").flatten().tolist()
        if len(said) != 2 or not all(type(size) is int and size > 0 for size in said):
            raise CheckpointError(f"its weight_shape is {said}, expected outputs and inputs")
        d_out, d_in = said
        per_word = _WORD // self.bits
        n_groups = -(-d_in // _group_of(d_in, self.group_size))
        expected: dict[str, tuple[int, ...]] = {
            "packed": (d_out, -(-d_in // per_word)),
            "scales": (1,) if parts.shape("scales") == (1,) else (d_out, n_groups),
        }
        if "zeros" in parts:
            expected["zeros"] = (-(-d_out // per_word), n_groups)
        if "g_idx" in parts:
            expected["g_idx"] = (d_in,)
        _check(parts, expected, ("packed", "zeros") if "zeros" in parts else ("packed",))
        return (d_out, d_in)

    def dequantise(self, parts: Parts) -> Tensor:
        """The weight, in float32."""
        d_in = self.shape(parts)[1]
        words = parts.read("packed")

        def read(place: slice) -> Tensor:
            return _unpack_columns(words[place], self.bits)[:, :d_in].T

        return _dequantise(read, self._read_zeros(parts), self._read_scales(parts), self._read_groups(parts))

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Rows of 4 bits are to be whole bytes."""
        return _why_odd(self.shape(parts)[1]) if self.bits == 4 else None

    def keep(self, parts: Parts, rows: Rows) -> QuantisedWeight:
        """Rows as they are stored: the bytes of a row's words are its numbers, in order."""
        d_in = self.shape(parts)[1]
        entries = _unpack_columns(rows.take(parts.read("packed")), 8)[:, : d_in * self.bits // 8].to(torch.uint8)
        zeros, scales, groups = self._read_zeros(parts), self._read_scales(parts), self._read_groups(parts)
        return _keep(f"uint{self.bits}", rows, entries, zeros, scales, groups)

    def _read_scales(self, parts: Parts) -> Tensor:
        scales = parts.read("scales")
        return scales.expand(1, self.shape(parts)[0]) if scales.shape == (1,) else scales.T

    def _read_zeros(self, parts: Parts) -> Tensor:
        scales = self._read_scales(parts)
        if "zeros" not in parts:
            return torch.full(scales.shape, 2 ** (self.bits - 1), dtype=torch.int32)
        return _unpack_columns(parts.read("zeros").T, self.bits)[:, : scales.shape[1]]

    def _read_groups(self, parts: Parts) -> Tensor:
        return _read_groups(parts, self.shape(parts)[1], self.group_size, self._read_scales(parts).shape[0])
