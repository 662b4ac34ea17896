import pytest
import torch

from hooklens.precision import wide_dtype, widen


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_numbers_are_copied_to_float32(dtype: torch.dtype) -> None:
    narrow = torch.tensor([[0.5, -3.0], [0.0, 1.25]]).to(dtype)
    wide = widen(narrow)
    assert (wide.dtype, wide_dtype(dtype)) == (torch.float32, torch.float32)
    # All four numbers are exact in each of the dtypes.
    assert wide.tolist() == [[0.5, -3.0], [0.0, 1.25]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_numbers_stay_the_tensor_that_they_are(dtype: torch.dtype) -> None:
    tensor = torch.randn(2, 3, dtype=dtype)
    assert widen(tensor) is tensor
    assert wide_dtype(dtype) == dtype
