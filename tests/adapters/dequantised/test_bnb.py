"""bitsandbytes' formats against what bitsandbytes itself saved and dequantised.

`bitsandbytes.safetensors` holds weights that version 0.50.2 quantised on a CPU, with the state that it saves, and what
its `dequantize_4bit` and `int8_vectorwise_dequant` gave for them (`expected.*`; of the wide one the last two rows).
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hooklens.adapters.dequantised.bnb import Bnb4Bit, Bnb8Bit
from hooklens.errors import CheckpointError
from tests.adapters.dequantised.packing import open_tensors

RECORDED = Path(__file__).parents[1] / "data" / "bitsandbytes.safetensors"


def recorded(name: str) -> tuple[dict[str, Tensor], Tensor]:
    tensors = load_file(RECORDED)
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}, tensors[f"expected.{name}"]


@pytest.mark.parametrize("name", ["nf4", "fp4", "wide"])
def test_four_bits_as_bitsandbytes_dequantises_them(name) -> None:
    """nf4 with double quantisation, fp4 without; `wide` has more blocks than share one nested scale."""
    state, expected = recorded(name)
    read = open_tensors(state, Bnb4Bit())
    assert list(read.names()) == [f"{name}.weight"]
    assert read.header(f"{name}.weight") == ("float32", tuple(read.read(f"{name}.weight").shape))
    assert torch.equal(read.read(f"{name}.weight")[-len(expected) :], expected)


def test_bytes_in_a_tensor_of_another_dtype() -> None:
    """`bnb_4bit_quant_storage` puts the same bytes into a bfloat16 tensor."""
    state, expected = recorded("nf4")
    state["nf4.weight"] = state["nf4.weight"].view(-1).view(torch.bfloat16)[:, None]
    assert torch.equal(open_tensors(state, Bnb4Bit()).read("nf4.weight"), expected)


def test_eight_bits_as_bitsandbytes_dequantises_them() -> None:
    state, expected = recorded("int8")
    read = open_tensors(state, Bnb8Bit())
    assert list(read.names()) == ["int8.weight"]
    # bitsandbytes multiplies by 1 / 127 after the scale: two more roundings.
    torch.testing.assert_close(read.read("int8.weight"), expected, rtol=3 * 2**-24, atol=0.0)


def edit_state(state: dict[str, Tensor], **changes: object) -> None:
    name = "nf4.weight.quant_state.bitsandbytes__nf4"
    described = {**json.loads(bytes(state[name].tolist())), **changes}
    state[name] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": [24, 41]}, "its entries has 480 entries, expected 492"),
        ({"blocksize": 32}, "its absmax has 15 entries, expected 30"),
        ({"shape": "24"}, r"its quant_state is .*; expected a shape and sizes of blocks"),
        ({"nested_blocksize": 0}, r"its quant_state is .*; expected a shape and sizes of blocks"),
        ({"shape": None}, r"its quant_state cannot be read"),
    ],
)
def test_damaged_states(changes, message) -> None:
    state, _ = recorded("nf4")
    edit_state(state, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_tensors(state, Bnb4Bit())


def test_missing_and_misshapen_tensors() -> None:
    state, _ = recorded("nf4")
    del state["nf4.weight.nested_absmax"]
    with pytest.raises(CheckpointError, match="its nested_absmax is missing"):
        open_tensors(state, Bnb4Bit())
    del state["nf4.weight.absmax"]
    with pytest.raises(CheckpointError, match=r"missing tensors: 'nf4.weight.absmax'"):
        open_tensors(state, Bnb4Bit())
    state, _ = recorded("int8")
    with pytest.raises(CheckpointError, match="its weight_format is 2; expected 0"):
        open_tensors({**state, "int8.weight_format": torch.tensor(2)}, Bnb8Bit())
    with pytest.raises(CheckpointError, match=r"is int8 \[6, 10\] with SCB \[5\]"):
        open_tensors({**state, "int8.SCB": torch.ones(5)}, Bnb8Bit())
