"""float8, int8 and MXFP4 against their definitions, entry by entry, and against transformers."""

import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from hooklens.adapters.dequantised.scaled import Mxfp4, Scaled
from hooklens.errors import CheckpointError
from tests.adapters.dequantised.packing import open_tensors, scaled_state

# One rounding, that of the product to float32.
EXACT = {"rtol": 2**-24, "atol": 0.0}
SHAPE = (20, 36)


def random_weight(seed: int = 0) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [(10, 12), (16, 16), (128, 128)])
def test_blocks_the_last_of_which_may_be_cut_off(dtype, block) -> None:
    state, weight = scaled_state("x", random_weight(), scale="weight_scale_inv", block=block, dtype=dtype)
    read = open_tensors({**state, "x.activation_scale": torch.ones(())}, Scaled("fp8", "weight_scale_inv", block))
    assert list(read.names()) == ["x.weight"]
    assert read.header("x.weight") == ("float32", SHAPE)
    torch.testing.assert_close(read.read("x.weight").double(), weight, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("block", [(1, SHAPE[1]), SHAPE, (1, 12)])
def test_scales_by_row_for_all_and_by_group(dtype, block) -> None:
    state, weight = scaled_state("x", random_weight(), scale="weight_scale", block=block, dtype=dtype)
    scheme = Scaled("compressed-tensors", "weight_scale", block if block == (1, 12) else None)
    torch.testing.assert_close(open_tensors(state, scheme).read("x.weight").double(), weight, **EXACT)
    flat = {**state, "x.weight_scale": state["x.weight_scale"].flatten()}
    if block != (1, 12):
        torch.testing.assert_close(open_tensors(flat, scheme).read("x.weight").double(), weight, **EXACT)


def test_zero_points() -> None:
    state, _ = scaled_state("x", random_weight(), scale="weight_scale", block=(1, SHAPE[1]), dtype=torch.int8)
    state["x.weight_zero_point"] = torch.arange(-10, 10)[:, None].to(torch.int8)
    expected = torch.tensor(
        [
            [float(state["x.weight_scale"][i, 0]) * (int(state["x.weight"][i, j]) - (i - 10)) for j in range(SHAPE[1])]
            for i in range(SHAPE[0])
        ],
        dtype=torch.float64,
    )
    read = open_tensors(state, Scaled("compressed-tensors", "weight_scale", None)).read("x.weight")
    torch.testing.assert_close(read.double(), expected, **EXACT)


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this version of torch lacks the dtype")
def test_scales_that_are_powers_of_two() -> None:
    state, _ = scaled_state("x", random_weight(), scale="weight_scale_inv", block=(10, 12))
    powers = torch.tensor([[0.25, 1.0, 8.0], [2.0, 2.0**-9, 4.0]])
    expected = state["x.weight"].float() * powers.repeat_interleave(10, 0).repeat_interleave(12, 1)
    state["x.weight_scale_inv"] = powers.to(torch.float8_e8m0fnu)
    read = open_tensors(state, Scaled("fp8", "weight_scale_inv", (10, 12))).read("x.weight")
    assert torch.equal(read, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x.weight": torch.zeros(SHAPE)}, "is float32; expected one of float8_e4m3fn"),
        ({"x.weight_scale_inv": torch.zeros(2, 3).to(torch.uint8)}, "its weight_scale_inv is uint8; expected one of"),
        (
            {"x.weight_scale_inv": torch.zeros(3, 2)},
            r"its weight_scale_inv is \[3, 2\] for \[20, 36\]; expected \[2, 3",
        ),
        ({"x.weight": torch.zeros(4, 4, 4).to(torch.float8_e4m3fn)}, r"is \[4, 4, 4\]; expected a matrix"),
        ({"x.weight_zero_point": torch.zeros(1)}, r"its weight_zero_point is \[1\]; expected \[2, 3\]"),
    ],
)
def test_tensors_that_do_not_fit_together(changes, message) -> None:
    state, _ = scaled_state("x", random_weight(), scale="weight_scale_inv", block=(10, 12))
    with pytest.raises(CheckpointError, match=message):
        open_tensors({**state, **changes}, Scaled("fp8", "weight_scale_inv", (10, 12)))


def test_mxfp4_as_transformers_dequantises_it() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 10, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(100, 150, (3, 10, 2), generator=generator, dtype=torch.uint8)
    state = {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales, "experts.bias": torch.zeros(3)}
    read = open_tensors(state, Mxfp4(), conv1d=True)
    assert sorted(read.names()) == ["experts.bias", "experts.down_proj"]
    assert read.header("experts.down_proj") == ("bfloat16", (3, 64, 10))
    found = read.read("experts.down_proj")
    for dtype in (torch.float32, torch.bfloat16):
        expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        assert torch.equal(found.to(dtype), expected)


def test_mxfp4_entry_by_entry() -> None:
    # OCP Microscaling Formats 1.0: a sign, two bits of exponent (bias 1), one of mantissa.
    def value(half: int) -> float:
        sign, exponent, mantissa = (-1.0) ** (half >> 3), (half >> 1) & 3, half & 1
        return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa * 0.5) * 2.0 ** (exponent - 1))

    blocks = torch.arange(256, dtype=torch.uint8).reshape(1, 8, 2, 16)
    scales = torch.tensor(list(range(119, 135)), dtype=torch.uint8).reshape(1, 8, 2)
    found = open_tensors({"x_blocks": blocks, "x_scales": scales}, Mxfp4()).read("x")
    for row in range(8):
        for column in range(64):
            byte = int(blocks[0, row, column // 32, column % 32 // 2])
            half = byte & 15 if column % 2 == 0 else byte >> 4
            assert float(found[0, column, row]) == value(half) * 2.0 ** (int(scales[0, row, column // 32]) - 127)


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (torch.zeros(3, 10, 2, 16).to(torch.uint8), torch.zeros(3, 10, 3).to(torch.uint8)),
        (torch.zeros(3, 10, 32).to(torch.uint8), torch.zeros(3, 10).to(torch.uint8)),
        (torch.zeros(3, 10, 2, 16), torch.zeros(3, 10, 2).to(torch.uint8)),
    ],
)
def test_mxfp4_tensors_that_do_not_fit_together(blocks, scales) -> None:
    with pytest.raises(
        CheckpointError, match=r"expected \[experts, out, groups, bytes\] and \[experts, out, groups\], uint8"
    ):
        open_tensors({"x_blocks": blocks, "x_scales": scales}, Mxfp4())
