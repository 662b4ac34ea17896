import pytest
import torch

from hooklens.adapters.files.disk import DTYPES
from hooklens.adapters.sources.repository import _torch_dtype


def test_a_dtype_that_torch_lacks_is_named(monkeypatch) -> None:
    """`import hooklens` failed with torch 2.6, which has not all dtypes that files can have."""
    assert _torch_dtype("BF16") == torch.bfloat16
    monkeypatch.setitem(DTYPES, "NEW", "float3_e1m1")
    with pytest.raises(ValueError, match=r"torch .* has no dtype float3_e1m1; take a newer one"):
        _torch_dtype("NEW")
