"""GPTQ and AWQ against their definitions, entry by entry."""

import pytest
import torch

from hooklens.adapters.dequantised import packed
from hooklens.adapters.dequantised.packed import Awq, CompressedPacked, Gptq
from hooklens.adapters.kept import Rows
from hooklens.errors import CheckpointError
from tests.adapters.dequantised.packing import awq_state, compressed_state, gptq_state, open_tensors, pack_rows

# One rounding, that of the product to float32.
EXACT = {"rtol": 2**-24, "atol": 0.0}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("less_one", [True, False])
@pytest.mark.parametrize(("d_in", "d_out", "group_size"), [(64, 24, 32), (32, 12, 32), (48, 8, 32)])
def test_gptq(bits, less_one, d_in, d_out, group_size) -> None:
    state, weight = gptq_state("x", d_in, d_out, bits=bits, group_size=group_size, less_one=less_one)
    read = open_tensors(state, Gptq(bits, group_size, zeros_less_one=less_one))
    assert list(read.names()) == ["x.weight"]
    assert read.header("x.weight") == ("float32", (d_out, d_in))
    torch.testing.assert_close(read.read("x.weight").double(), weight, **EXACT)


@pytest.mark.parametrize("group_size", [32, -1])
def test_gptq_in_order_of_inputs_without_an_index(group_size) -> None:
    state, weight = gptq_state("x", 64, 16, bits=4, group_size=64 if group_size == -1 else group_size)
    order = state.pop("x.g_idx").long().argsort(stable=True)
    # Where there is no index, rows lie in the order of their groups.
    words = state["x.qweight"]
    numbers = torch.stack([(words >> shift) & 15 for shift in range(0, 32, 4)], 1).reshape(64, 16)
    state["x.qweight"] = pack_rows(numbers[order].T.tolist(), 4).T.contiguous()
    read = open_tensors(state, Gptq(4, group_size))
    torch.testing.assert_close(read.read("x.weight").double(), weight[:, order], **EXACT)


@pytest.mark.parametrize("group_size", [16, 32, -1])
def test_awq(group_size) -> None:
    state, weight = awq_state("x", 32, 24, group_size=32 if group_size == -1 else group_size)
    read = open_tensors(state, Awq(group_size))
    assert read.header("x.weight") == ("float32", (24, 32))
    torch.testing.assert_close(read.read("x.weight").double(), weight, **EXACT)


def test_weights_that_are_unpacked_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(packed, "_AT_ONCE", 1)
    gptq, weight = gptq_state("x", 32, 72, bits=4, group_size=16)
    torch.testing.assert_close(open_tensors(gptq, Gptq(4, 16)).read("x.weight").double(), weight, **EXACT)
    awq, weight = awq_state("x", 32, 72, group_size=16)
    torch.testing.assert_close(open_tensors(awq, Awq(16)).read("x.weight").double(), weight, **EXACT)


def test_biases_of_zeros_are_padding_only_beside_a_gptq_weight() -> None:
    state, _ = gptq_state("x", 32, 8, bits=4, group_size=32)
    biases = {"x.bias": torch.zeros(8), "norm.bias": torch.zeros(8)}
    read = open_tensors({**state, **biases}, Gptq(4, 32))
    assert [read.is_padding(name) for name in ("x.bias", "norm.bias", "x.weight")] == [True, False, False]
    biases["x.bias"][3] = 1e-30
    assert not open_tensors({**state, **biases}, Gptq(4, 32)).is_padding("x.bias")
    awq, _ = awq_state("x", 32, 8, group_size=32)
    assert not open_tensors({**awq, "x.bias": torch.zeros(8)}, Awq(32)).is_padding("x.bias")


@pytest.mark.parametrize(
    ("scheme", "role", "changed", "message"),
    [
        (Gptq(4, 16), "scales", None, r"its qzeros is \[1, 1\], expected \[2, 1\]; its scales is \[1, 8\], expected"),
        (Gptq(4, 32), "scales", torch.zeros(1, 9), r"its scales is \[1, 9\], expected \[1, 8\]"),
        (Gptq(4, 32), "qweight", torch.zeros(4, 8), "its qweight is float32, expected int32"),
        (Gptq(4, 32), "g_idx", torch.zeros(3).int(), r"its g_idx is \[3\], expected \[32\]"),
        (Awq(32), "scales", torch.zeros(2, 8), r"its qzeros is \[1, 1\], expected \[1, 4\]; its scales is \[2, 8\], "),
    ],
)
def test_tensors_that_do_not_fit_together(scheme, role, changed, message) -> None:
    state, _ = gptq_state("x", 32, 8, bits=4, group_size=32)
    if changed is not None:
        state[f"x.{role}"] = changed
    if isinstance(scheme, Awq):
        state["x.qweight"] = torch.zeros(32, 4).int()
    with pytest.raises(CheckpointError, match=rf"here: weights .* cannot be read: 'x.weight': {message}"):
        open_tensors(state, scheme)


def test_groups_that_do_not_exist() -> None:
    state, _ = gptq_state("x", 32, 8, bits=4, group_size=32)
    state["x.g_idx"][5] = 1
    read = open_tensors(state, Gptq(4, 32))
    with pytest.raises(CheckpointError, match="names groups from 0 to 1; there are 1"):
        read.read("x.weight")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(24, 16), (21, 13)])
def test_compressed_tensors_packed(bits, zeros, d_in, d_out) -> None:
    """Also rows that fill no whole words, and inputs in any order of groups."""
    state, weight = compressed_state("a", d_in, d_out, bits=bits, group_size=8, zeros=zeros, shuffled=zeros)
    read = open_tensors(state, CompressedPacked(bits, 8, has_zeros=zeros))
    assert read.header("a.weight") == ("float32", (d_out, d_in))
    torch.testing.assert_close(read.read("a.weight").double(), weight, rtol=2**-24, atol=0)
    rows = Rows(torch.tensor([5, 0, 12]), is_whole=False)
    assert (read.why_not_kept("a.weight", rows) is None) == (bits == 8 or d_in % 2 == 0)


def test_compressed_tensors_with_one_scale() -> None:
    state, _ = compressed_state("a", 16, 8, bits=4, group_size=16, zeros=False)
    whole = {**state, "a.weight_scale": torch.tensor([0.5])}
    rows = {**state, "a.weight_scale": torch.full((8, 1), 0.5)}
    found, expected = (open_tensors(one, CompressedPacked(4, -1)).read("a.weight") for one in (whole, rows))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight_shape", torch.tensor([8]), r"weight_shape is \[8\], expected outputs and inputs"),
        ("weight_shape", torch.tensor([8, 32]), r"its packed is \[8, 2\], expected \[8, 4\]"),
        ("weight_scale", torch.ones(8, 3), r"its scales is \[8, 3\], expected \[8, 2\]"),
        ("weight_zero_point", torch.ones(1, 2), r"its zeros is float32, expected int32"),
        ("weight_zero_point", None, r"missing tensors: 'a\.weight_zero_point'"),
    ],
)
def test_compressed_tensors_that_do_not_fit_together(name, value, message) -> None:
    state, _ = compressed_state("a", 16, 8, bits=4, group_size=8, zeros=True)
    changed = {**state, f"a.{name}": value}
    with pytest.raises(CheckpointError, match=message):
        open_tensors(
            {own: one for own, one in changed.items() if one is not None}, CompressedPacked(4, 8, has_zeros=True)
        )
