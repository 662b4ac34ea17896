"""What bitsandbytes saves: 4-bit numbers that index a table of values (Dettmers et al. 2023, "QLoRA"), and int8 rows.

4 bits: blocks of entries, in the order of the flat weight, share the largest magnitude in the block, `absmax`:

    weight[k] = quant_map[q[k]] absmax[k // blocksize]

Two numbers lie in a byte, the high half first. With double quantisation `absmax` is itself
`nested_quant_map[absmax] nested_absmax[block // nested_blocksize] + nested_offset`. 8 bits (Dettmers et al. 2022,
"LLM.int8()"): `weight[i, j] = q[i, j] SCB[i] / 127`.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hooklens.adapters.dequantised.tensors import Parts
from hooklens.adapters.kept import QuantisedWeight, Rows, keep_int8
from hooklens.arguments import show
from hooklens.errors import CheckpointError

_STATE = ".weight.quant_state.bitsandbytes__{}"
_KINDS = ("nf4", "fp4")
_NESTED = ("nested_absmax", "nested_quant_map")
_LARGEST = 127


class Bnb4Bit:
    """4-bit weights with the state that bitsandbytes saves beside them."""

    name = "bitsandbytes, 4 bits"
    markers = tuple(map(_STATE.format, _KINDS))
    plain = ".weight"
    parts: Mapping[str, str] = {
        "entries": ".weight",
        "absmax": ".weight.absmax",
        "quant_map": ".weight.quant_map",
    }
    extras: Mapping[str, str] = {
        **{kind: _STATE.format(kind) for kind in _KINDS},
        **{role: f".weight.{role}" for role in _NESTED},
    }
    ignored = ()
    dtype = torch.float32
    is_turned = False
    pads_biases = False

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """What the state says, held against the sizes of the tensors."""
        state = _read_state(parts)
        shape, n_entries = tuple(state["shape"]), math.prod(state["shape"])
        n_blocks = -(-n_entries // state["blocksize"])
        sizes = {"entries": -(-n_entries // 2), "absmax": n_blocks, "quant_map": 16}
        if "nested_blocksize" in state:
            missing = [role for role in _NESTED if role not in parts]
            if missing:
                raise CheckpointError(f"its {' and '.join(missing)} is missing")
            sizes |= {"nested_absmax": -(-n_blocks // state["nested_blocksize"]), "nested_quant_map": 256}
        found = {role: math.prod(parts.shape(role)) for role in sizes}
        # The bytes lie in a tensor of any dtype (`bnb_4bit_quant_storage`).
        found["entries"] *= _size_of(parts.dtype("entries"))
        wrong = [
            f"its {role} has {found[role]} entries, expected {size}"
            for role, size in sizes.items()
            if found[role] != size
        ]
        if "nested_blocksize" in state and parts.dtype("absmax") != "uint8":
            wrong.append(f"its absmax is {parts.dtype('absmax')}, expected uint8")
        if wrong:
            raise CheckpointError("; ".join(wrong))
        return shape

    def dequantise(self, parts: Parts) -> Tensor:
        """The weight, in float32."""
        state = _read_state(parts)
        absmax = _read_absmax(parts, state)
        packed = parts.read("entries").flatten().view(torch.uint8)
        numbers = torch.stack((packed >> 4, packed & 0xF), dim=-1).flatten()[: math.prod(state["shape"])]
        weight = parts.read("quant_map").float()[numbers.int()]
        weight *= _spread(absmax, state["blocksize"], len(weight))
        return weight.reshape(state["shape"])

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Blocks run on from one row into the next where rows are no multiple of them."""
        state = _read_state(parts)
        d_in, blocksize = state["shape"][1], state["blocksize"]
        if rows.is_whole or d_in % blocksize == 0:
            return None
        return f"it holds several maps, whose rows of {d_in} numbers share scales of {blocksize}"

    def keep(self, parts: Parts, rows: Rows) -> QuantisedWeight:
        """Rows as they are stored, with scales that are not quantised themselves: to the same numbers."""
        state = _read_state(parts)
        d_out, d_in = state["shape"]
        packed, absmax = parts.read("entries").flatten().view(torch.uint8), _read_absmax(parts, state)
        if not rows.is_whole:
            packed = packed.view(d_out, -1)[rows.numbers].flatten()
            absmax = absmax.view(d_out, -1)[rows.numbers].flatten()
        return QuantisedWeight(
            "4-bit blocks",
            (len(rows.numbers), d_in),
            {"entries": packed, "absmax": absmax.float(), "quant_map": parts.read("quant_map").float()},
            {"kind": next(kind for kind in _KINDS if kind in parts), "blocksize": state["blocksize"]},
        )


class Bnb8Bit:
    """int8 weights with a scale for each row, 127 times that of an entry."""

    name = "bitsandbytes, 8 bits"
    markers = (".SCB",)
    plain = ".weight"
    parts: Mapping[str, str] = {"entries": ".weight", "scales": ".SCB"}
    extras: Mapping[str, str] = {"format": ".weight_format"}
    ignored = ()
    dtype = torch.float32
    is_turned = False
    pads_biases = False

    def shape(self, parts: Parts) -> tuple[int, ...]:
        """That of the entries."""
        shape = parts.shape("entries")
        if parts.dtype("entries") != "int8" or len(shape) != 2 or parts.shape("scales") != shape[:1]:
            raise CheckpointError(
                f"is {parts.dtype('entries')} {list(shape)} with SCB {list(parts.shape('scales'))}; expected an int8 "
                "matrix and a number for each of its rows"
            )
        # 0 is the plain order; others are tilings for a GPU's kernels.
        if "format" in parts and int(parts.read("format")) != 0:
            raise CheckpointError(f"its weight_format is {int(parts.read('format'))}; expected 0, rows as they are")
        return shape

    def dequantise(self, parts: Parts) -> Tensor:
        """The weight, in float32."""
        scales = parts.read("scales").to(torch.float32) / _LARGEST
        return parts.read("entries").to(torch.float32).mul_(scales[:, None])

    def why_not_kept(self, parts: Parts, rows: Rows) -> str | None:
        """Nothing: each row has a scale of its own."""
        return None

    def keep(self, parts: Parts, rows: Rows) -> QuantisedWeight:
        """Rows as they are stored."""
        scales = rows.take(parts.read("scales").to(torch.float32) / _LARGEST)
        return keep_int8(rows.take(parts.read("entries")), scales[:, None])


def _read_absmax(parts: Parts, state: Mapping[str, Any]) -> Tensor:
    """The scale of each block, which may be quantised itself."""
    absmax = parts.read("absmax").flatten()
    if "nested_blocksize" not in state:
        return absmax
    scales = _spread(parts.read("nested_absmax"), state["nested_blocksize"], len(absmax))
    nested: Tensor = parts.read("nested_quant_map").float()[absmax.int()] * scales
    return nested + float(state["nested_offset"])


def _spread(scales: Tensor, block: int, size: int) -> Tensor:
    return scales.to(torch.float32).flatten().repeat_interleave(block)[:size]


def _size_of(dtype: str) -> int:
    """Bytes of an entry; 0 where torch has no such dtype."""
    found = getattr(torch, dtype, None)
    return found.itemsize if isinstance(found, torch.dtype) else 0


def _read_state(parts: Parts) -> dict[str, Any]:
    """What bitsandbytes keeps as JSON in the bytes of a tensor."""
    kind = next(kind for kind in _KINDS if kind in parts)
    try:
        state = json.loads(bytes(parts.read(kind).tolist()))
        counts = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
        offset = state.get("nested_offset", 0.0)
        whole = all(type(count) is int and count > 0 for count in counts) and isinstance(offset, int | float)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"its quant_state cannot be read ({error})") from error
    if not whole or ("nested_blocksize" in state) != ("nested_offset" in state):
        raise CheckpointError(f"its quant_state is {show(state)}; expected a shape and sizes of blocks")
    return dict(state)
